"""Names of everything under a run, in one place.

::

    <run>/config.yaml  owner.json
    <run>/graph/manifest.json                   part-00000-<sha8>.safetensors ...
    <run>/teacher/model.json model.safetensors  checkpoints/       teachers/<name>/ where there are several
    <run>/knowledge/<teacher>-<fp8>/manifest.json   part-00000-<sha8>.safetensors ...  tmp-<fp8>/
    <run>/students/<name>/model.json model.safetensors  checkpoints/step-00000500/  predictions/
    <run>/export/model.json model.safetensors README.md
    <run>/stages/<stage>.json
    <run>/tensorboard/<name>/events...
    <run>/metrics.json  report.html

Keys are relative to a store's root and always use ``/``.
"""

from __future__ import annotations

CONFIG = "config.yaml"
OWNER = "owner.json"
METRICS = "metrics.json"
REPORT = "report.html"
GRAPH = "graph"
TEACHER = "teacher"
TEACHERS = "teachers"
KNOWLEDGE = "knowledge"
STUDENTS = "students"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
MODEL_JSON = "model.json"
MODEL_WEIGHTS = "model.safetensors"
COMMIT = "COMMIT.json"


def part(index: int) -> str:
    """Name of part ``index`` without digest or suffix, e.g. ``part-00003``."""
    return f"part-{index:05d}"


def manifest_page(number: int, sha256: str) -> str:
    """Name of page ``number`` of a manifest with many parts, e.g. ``manifest-0000-0123abcd.json``."""
    return f"manifest-{number:04d}-{sha256[:8]}.json"


def stage_record(stage: str) -> str:
    """Key of the record that a finished stage leaves."""
    return f"stages/{stage}.json"


def one_teacher(name: str) -> str:
    """Folder of the teacher ``name`` of several."""
    return f"{TEACHERS}/{name}"


def student(name: str) -> str:
    """Folder of the student ``name`` (``distilled``, ``alone``)."""
    return f"{STUDENTS}/{name}"


def checkpoint(step: int) -> str:
    """Folder of a checkpoint, relative to its student or teacher folder."""
    return f"{CHECKPOINTS}/step-{step:08d}"


def knowledge(teacher: str, fingerprint: str) -> str:
    """Folder of one teacher's knowledge, relative to the knowledge store."""
    return f"{teacher}-{fingerprint[:8]}"


def layer_outputs(fingerprint: str) -> str:
    """Folder of the intermediate layer outputs, relative to the knowledge folder."""
    return f"tmp-{fingerprint[:8]}"
