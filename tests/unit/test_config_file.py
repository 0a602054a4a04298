"""From YAML and overrides to a Config, and from each mistake to one line that says where it is."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from gkd_dist.config import Config, KdLoss, LspLoss, SyntheticSource
from gkd_dist.config_file import config_fingerprint, config_schema, dump_config, load_config, parse_config
from gkd_dist.config_tree import dump_yaml, interpolate_env, parse_yaml
from gkd_dist.errors import ConfigError

BASE = """\
run: runs/a
graph:
  source: {kind: pyg, name: Amazon, args: {name: Computers}}
teacher:
  model: {kind: gat, hidden: 128, heads: 8}
student:
  model: {kind: gcn, hidden: 16}
losses:
  - {kind: label}
  - {kind: lsp, weight: 1e1, sigma: median}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes files into a folder that is the current one, so that messages hold short names."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(dedent(text), encoding="utf-8")
        return name

    return write


def problems(*overrides: str, text: str = BASE) -> list[str]:
    """Lines of the error that ``text`` with ``overrides`` gives."""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "x.yaml", overrides)
    return str(caught.value).split("\n")


class TestReading:
    def test_a_file_becomes_a_config(self, write):
        config = load_config(write("base.yaml", BASE))
        assert config.teacher.model.heads == 8
        assert isinstance(config.losses[1], LspLoss)
        assert (config.losses[1].weight, config.losses[1].sigma) == (10.0, "median")

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-3", 0.001),
            ("-2E4", -20000.0),
            ("5.0e-4", 0.0005),
            (".5", 0.5),
            ("3.", 3.0),
            ("1_000", 1000),
            ("0x10", 16),
            ("010", "010"),
            ("1:30", "1:30"),
            ("no", "no"),
            ("on", "on"),
            ("true", True),
            ("null", None),
            ("~", None),
            ("", None),
            ("2024-01-01", "2024-01-01"),
            ("1.2.3", "1.2.3"),
            ("e3", "e3"),
            ("'1e-3'", "1e-3"),
        ],
    )
    def test_scalars_are_those_of_yaml_1_2(self, text: str, value: object):
        read = parse_yaml(f"key: {text}", "x.yaml").plain()["key"]
        assert read == value
        assert type(read) is type(value)

    def test_anchors_and_merge_keys(self):
        text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"
        assert parse_yaml(text, "x.yaml").plain()["b"] == {"x": 1, "y": 3}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("run: a\nseed: 1\nrun: b\n", r"x.yaml:3: run: given twice \(first on line 1\); keep one"),
            ("a: {b: 1, b: 2}\n", r"x.yaml:1: b: given twice"),
            ("a:\n  - b\n c: 1\n", r"x.yaml:3: not valid YAML"),
            ("a: [1, 2\n", r"x.yaml:2: not valid YAML"),
            ("a: 1\n---\nb: 1\n", r"x.yaml:2: not valid YAML: .*another document"),
            ("a: !!python/object:os.system {}\n", r"x.yaml:1: tag .* is not allowed"),
            ("a: !!python/name:os.system\n", r"x.yaml:1: not valid YAML: could not determine a constructor"),
            ("a: &a [*a]\n", r"x.yaml:1: an alias points into itself"),
            ("1: a\n", r"x.yaml:1: a key must be text \(got 1\); quote it"),
            ("a: \x00", r"x.yaml: not valid YAML"),
        ],
    )
    def test_text_that_cannot_be_trusted(self, text: str, message: str):
        with pytest.raises(ConfigError, match=message):
            parse_yaml(text, "x.yaml")

    @pytest.mark.parametrize(("text", "found"), [("", "nothing"), ("- 1\n", r"\[1\]"), ("hello", '"hello"')])
    def test_not_a_mapping(self, text: str, found: str):
        with pytest.raises(ConfigError, match=f"^x.yaml: expected a mapping of sections .* got {found}$"):
            parse_config(text, "x.yaml")

    def test_no_such_file(self, write):
        with pytest.raises(ConfigError, match=r"^nope.yaml: no such file \(from /"):
            load_config("nope.yaml")

    def test_not_text(self, tmp_path: Path):
        (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
            load_config(tmp_path / "x.yaml")
        with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
            load_config(tmp_path)


class TestExtends:
    def test_mappings_are_merged_and_lists_replaced(self, write):
        write("configs/base.yaml", BASE)
        path = write(
            "configs/deep/x.yaml",
            """\
            extends: ../base.yaml
            teacher: {model: {hidden: 32}}
            losses: [{kind: kd}]
            """,
        )
        config = load_config(path)
        assert (config.teacher.model.hidden, config.teacher.model.heads) == (32, 8)
        assert config.losses == (KdLoss(kind="kd"),)

    def test_a_chain_ends_with_the_file_that_was_named(self, write):
        write("a.yaml", BASE + "seed: 1\n")
        write("b.yaml", "extends: a.yaml\nseed: 2\nrun: b\n")
        config = load_config(write("c.yaml", "extends: b.yaml\nseed: 3\n"))
        assert (config.seed, config.run) == (3, "b")

    def test_problems_name_the_file_that_holds_the_value(self, write):
        write("base.yaml", BASE.replace("hidden: 16", "hidden: 0"))
        path = write("x.yaml", "extends: base.yaml\n\nseed: one\n")
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(caught.value).split("\n") == [
            'x.yaml:3: seed: expected an integer, got "one"',
            "base.yaml:7: student.model.hidden: expected an integer > 0, got 0",
        ]

    def test_circles_are_named(self, write):
        write("a.yaml", "extends: b.yaml\n")
        write("b.yaml", "\nextends: a.yaml\n")
        with pytest.raises(ConfigError) as caught:
            load_config("a.yaml")
        assert str(caught.value) == (
            "b.yaml:2: extends: files extend each other in a circle: a.yaml -> b.yaml -> a.yaml"
        )

    def test_a_parent_that_is_missing_or_no_name(self, write):
        with pytest.raises(ConfigError, match=r"^x.yaml:2: extends: gone.yaml: no such file"):
            load_config(write("x.yaml", "seed: 1\nextends: gone.yaml\n"))
        with pytest.raises(ConfigError, match=r"^y.yaml:1: extends: expected the name of one file, got \[\"a\"\]"):
            load_config(write("y.yaml", "extends: [a]\n"))

    def test_text_cannot_extend_a_file(self):
        with pytest.raises(ConfigError, match=r"x.yaml:1: extends: only files can extend a file"):
            parse_config("extends: base.yaml\n", "x.yaml")


class TestOverrides:
    def test_dotted_keys_and_list_indices(self):
        config = parse_config(BASE, overrides=["distill.num_workers=4", "losses.1.weight=2.5", "distill.lr=1e-3"])
        assert config.distill.num_workers == 4
        assert config.losses[1].weight == 2.5
        assert config.distill.lr == 0.001

    def test_later_ones_win(self):
        assert parse_config(BASE, overrides=["seed=1", "seed=2"]).seed == 2

    def test_values_are_yaml(self):
        changes = ["losses=[{kind: kd, temperature: 2}]", "teacher.model={hidden: 4}", "run='a=b'"]
        config = parse_config(BASE, overrides=changes)
        assert config.losses == (KdLoss(kind="kd", temperature=2.0),)
        assert (config.teacher.model.hidden, config.teacher.model.heads) == (4, 8)  # mappings are merged
        assert config.run == "a=b"

    def test_nothing_after_the_sign_means_null(self):
        assert parse_config(BASE + "stores: {graph: a}\n", overrides=["stores.graph="]).stores.graph is None

    def test_an_item_is_appended_at_the_length_of_the_list(self):
        assert parse_config(BASE, overrides=["losses.2={kind: kd}"]).losses[2] == KdLoss(kind="kd")

    def test_free_mappings_take_any_key(self):
        options = ["storage.options.s3.endpoint_url=http://store:9000", "graph.source.args.name=Photo"]
        config = parse_config(BASE, overrides=options)
        assert config.storage.options == {"s3": {"endpoint_url": "http://store:9000"}}
        assert config.graph.source.args == {"name": "Photo"}  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("override", "line"),
        [
            ("distill.num_worker=4", "unknown key; did you mean num_workers?"),
            ("num_workers=4", "unknown key; did you mean distill.num_workers?"),
            ("lr=4", "unknown key; did you mean teacher.train.lr or teachers.*.train.lr or distill.lr?"),
            ("distill.num_workers=two", 'expected an integer > 0 or a list, got "two"'),
            ("distill.num_workers=0", "expected an integer > 0 or a list, got 0"),
            ("distill.num_workers=true", "expected an integer > 0 or a list, got true"),
            ("distill.zero_stage=4", "expected one of 0, 1, 2, 3, got 4"),
            ("distill.launcher=torchrn", 'expected one of ray, torchrun, deepspeed, inline, got "torchrn"; '
             "did you mean torchrun?"),
            ("distill.units_per_step=half", 'expected an integer > 0 or all, got "half"'),
            ("losses.1.sigma=-1", "expected a number > 0 or median, got -1"),
            ("losses.1.temprature=2", "unknown key of kind lsp; did you mean temperature?"),
            ("losses.9.weight=1", "losses is a list of 2; expected an index 0..1, or 2 to append, got 9"),
            ("losses.first.weight=1", "losses is a list of 2; expected an index 0..1, or 2 to append, got first"),
            ("run.x=1", "run is a single value (runs/a) and has no key x"),
            ("distill.grad_clip=0", "expected a number > 0 or null, got 0"),
            ("teacher.name=a/b", 'expected text that matches ^[A-Za-z0-9_][A-Za-z0-9_.-]*$, got "a/b"'),
            ("student.model.kind=gnc", "expected one of gcn, sage, gat, gin, mlp or module:attr, got 'gnc'"),
            ("losses=[]", "expected at least 1 item, got []"),
            ("seed", "expected dotted.key=value, e.g. distill.num_workers=4"),
            ("=4", "expected dotted.key=value, e.g. distill.num_workers=4"),
            ("a..b=4", "expected dotted.key=value, e.g. distill.num_workers=4"),
            ("seed=[1", "not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ],
    )  # fmt: skip
    def test_mistakes_repeat_the_override(self, override: str, line: str):
        assert problems(override) == [f"override {override}: {line}"]

    def test_a_key_inside_an_override_is_named(self):
        assert problems("distill={num_worker: 3}") == [
            "override distill={num_worker: 3}: distill.num_worker: unknown key; did you mean num_workers?"
        ]

    def test_rules_across_sections_name_the_source_of_their_first_key(self):
        (line,) = problems("distill.launcher=inline")
        assert line.startswith("override distill.launcher=inline: distill.launcher inline is one process")
        (line,) = problems("losses.1.teacher_layer=-5")
        assert line.startswith("override losses.1.teacher_layer=-5: losses.1.teacher_layer: layer -5 does not exist")
        (line,) = problems(text=BASE.replace("runs/a", "memory://a"))
        assert line.startswith("x.yaml: a memory: run lives in one process")


class TestKinds:
    def test_a_new_kind_drops_file_keys_that_it_does_not_know(self, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.INFO, "gkd_dist"):
            config = parse_config(BASE, "x.yaml", ["graph.source.num_nodes=50", "graph.source.kind=synthetic"])
        assert config.graph.source == SyntheticSource(kind="synthetic", num_nodes=50)
        assert caplog.messages == [
            "override graph.source.kind=synthetic: graph.source.kind is now synthetic; dropped name, args of x.yaml:3"
        ]

    def test_keys_that_both_kinds_know_stay(self):
        config = parse_config(BASE, overrides=["losses.1.kind=kd"])
        assert config.losses[1] == KdLoss(kind="kd", weight=10.0)

    def test_keys_of_overrides_are_never_dropped(self):
        assert problems("graph.source.kind=synthetic", "graph.source.name=Cora") == [
            "override graph.source.name=Cora: unknown key of kind synthetic; "
            "known keys are kind, num_nodes, num_classes, average_degree, homophily, partner, num_features, signal, "
            "noise, degree_exponent, max_degree_factor, multilabel, seed"
        ]

    def test_restating_the_kind_hides_no_typo(self):
        text = BASE.replace("name: Amazon", "name: Amazon, arg: 1")
        expected = ["x.yaml:3: graph.source.arg: unknown key of kind pyg; did you mean args?"]
        assert problems("graph.source.kind=pyg", text=text) == expected

    def test_a_file_may_change_the_kind_of_its_parent(self, write):
        write("base.yaml", BASE)
        config = load_config(write("x.yaml", "extends: base.yaml\ngraph: {source: {kind: synthetic}}\n"))
        assert config.graph.source == SyntheticSource(kind="synthetic")

    def test_a_kind_that_does_not_exist(self):
        expected = 'expected one of pyg, arrays, synthetic, got "pgy"; did you mean pyg?'
        (line,) = problems("graph.source.kind=pgy")
        assert line.startswith("override graph.source.kind=pgy: expected one of pyg, ")
        assert line.endswith('got "pgy"; did you mean pyg?'), expected
        (line,) = problems("losses.0={weight: 2}", text=BASE.replace("{kind: label}", "{}"))
        assert line == "override losses.0={weight: 2}: losses.0.kind: missing; expected one of label, kd, lsp, fitnet"


class TestMissing:
    def test_missing_keys_name_their_section(self):
        text = BASE.replace("  model: {kind: gcn, hidden: 16}\n", "  alone: false\n").replace("run: runs/a\n", "")
        assert problems(text=text) == [
            "x.yaml: run: missing; expected text",
            "x.yaml:5: student.model: missing; expected a mapping",
        ]

    def test_every_problem_has_one_line(self):
        text = BASE.replace("hidden: 16", "hiden: 16").replace("weight: 1e1", "weight: heavy") + "distil: {}\n"
        assert problems("seed=x", text=text) == [
            'override seed=x: expected an integer, got "x"',
            "x.yaml:7: student.model.hiden: unknown key; did you mean hidden?",
            'x.yaml:10: losses.1.weight: expected a number >= 0, got "heavy"',
            "x.yaml:11: distil: unknown key; did you mean distill?",
        ]


class TestEnvironment:
    def test_a_variable_gets_the_type_it_would_have_if_written_out(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("GKD_TEST_SEED", "7")
        monkeypatch.delenv("GKD_TEST_NONE", raising=False)
        text = BASE.replace("runs/a", "${env:GKD_TEST_NONE,runs}/${env:GKD_TEST_SEED}") + "seed: ${env:GKD_TEST_SEED}\n"
        config = parse_config(text)
        assert (config.run, config.seed) == ("runs/7", 7)
        assert parse_yaml("a: '${env:GKD_TEST_SEED}'\nb: ${env:GKD_TEST_NONE,}", "x").plain() == {"a": "7", "b": None}

    def test_overrides_may_use_them(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("GKD_TEST_LR", "1e-2")
        assert parse_config(BASE, overrides=["distill.lr=${env:GKD_TEST_LR}"]).distill.lr == 0.01

    def test_mistakes(self):
        with pytest.raises(ConfigError, match=r"x.yaml:3: environment variable B is not set; set it or write"):
            interpolate_env("${env:A}${env:B}", "x.yaml:3", {"A": "1"})
        with pytest.raises(ConfigError, match=r"x.yaml:3: expected \$\{env:NAME\} or .*, got \$\{HOME\}"):
            interpolate_env("${HOME}", "x.yaml:3", {})


class TestOut:
    def test_a_dump_is_read_back_equal(self):
        config = parse_config(
            BASE,
            overrides=["distill.lr=1e-5", "distill.deepspeed={comms_logger: {enabled: false, prof_ops: [a, null]}}"],
        )
        dumped = dump_config(config)
        assert parse_config(dumped) == config
        assert Config.model_validate(yaml.safe_load(dumped)) == config  # any other YAML reader does too
        assert list(yaml.safe_load(dumped))[:3] == ["run", "stores", "storage"]  # in flow order

    def test_the_schema_knows_every_section_and_demands_only_kinds(self):
        schema = config_schema()
        assert list(schema["properties"]) == ["extends", *Config.model_fields]
        assert schema["additionalProperties"] is False
        assert schema["required"] == []
        assert schema["$defs"]["LspLoss"]["required"] == ["kind"]
        assert schema["$defs"]["DistillConfig"]["properties"]["lr"]["exclusiveMinimum"] == 0
        json.dumps(schema)

    def test_defaults_and_written_values_have_the_same_fingerprint(self):
        one = parse_config(BASE).partition
        same = parse_config(BASE, overrides=["partition={num_parts: 4, method: metis}"]).partition
        other = parse_config(BASE, overrides=["partition.num_parts=5"]).partition
        assert config_fingerprint(one) == config_fingerprint(same)
        assert config_fingerprint(one) != config_fingerprint(other)
        assert config_fingerprint([one, {"v": 1}]) == config_fingerprint((same, {"v": 1}))

    def test_a_fingerprint_is_the_digest_of_canonical_json(self):
        # printf '{"a":[1,2.5,null],"b":"\\u00e9"}' | sha256sum
        expected = "45584828a616e524473fb887d415f828918fb9676efdaa57c062231771111499"
        assert config_fingerprint({"b": "é", "a": (1, 2.5, None)}) == expected

    def test_what_has_no_canonical_form_is_refused(self):
        with pytest.raises(TypeError, match="cannot fingerprint a object"):
            config_fingerprint({"a": object()})
        with pytest.raises(ValueError, match="not JSON compliant"):
            config_fingerprint(float("nan"))


TEXT = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=8).filter(lambda text: "${" not in text)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXT, VALUES, max_size=4))
@example({"1e5": "1e5", "yes": "no", "0o7": "1:30", "": "null", "<<": "=", "é": "0x1F"})
def test_whatever_is_dumped_is_read_back_equal(value: dict[str, Any]):
    assert parse_yaml(dump_yaml(value), "x.yaml").plain() == value
    assert yaml.safe_load(dump_yaml(value)) == value
