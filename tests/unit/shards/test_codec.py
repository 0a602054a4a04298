"""The codec against hand-made bytes, against the safetensors library, and against garbage."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gkd_dist.errors import ShardError
from gkd_dist.shards.codec import decode, encode, encode_pieces, read_spans

DTYPES = [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64,
          torch.float16, torch.bfloat16, torch.float32, torch.float64]  # fmt: skip


def example(dtype: torch.dtype, *shape: int) -> Tensor:
    values = torch.arange(max(1, torch.Size(shape).numel())) % 2
    return values[: torch.Size(shape).numel()].reshape(shape).to(dtype)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and left[k].shape == right[k].shape and torch.equal(left[k], right[k])
        for k in left
    )


def build(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_the_bytes_of_a_small_object() -> None:
    data = encode({"b": torch.tensor([True]), "a": torch.tensor([1, 2], dtype=torch.int16)}, {"k": "v"})
    header = (
        b'{"__metadata__":{"k":"v"},"a":{"dtype":"I16","shape":[2],"data_offsets":[0,4]},'
        b'"b":{"dtype":"BOOL","shape":[1],"data_offsets":[4,5]}}'
    )
    padded = header + b" " * (-len(header) % 8)
    assert data == len(padded).to_bytes(8, "little") + padded + b"\x01\x00\x02\x00" + b"\x01"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3)], ids=str)
def test_round_trip_here_and_with_the_library(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = {"t": example(dtype, *shape), "other": torch.arange(3)}
    assert same(decode(encode(tensors)), tensors)
    assert same(safetensors.torch.load(encode(tensors)), tensors)
    assert same(decode(safetensors.torch.save(tensors)), tensors)


def test_no_tensors_is_an_object_too() -> None:
    assert decode(encode({})) == {}


def test_equal_tensors_give_equal_bytes_whatever_their_order_and_strides() -> None:
    a, b = torch.arange(6).reshape(2, 3), torch.randn(4)
    assert encode({"a": a, "b": b}) == encode({"b": b.clone(), "a": a.t().contiguous().t()})


def test_every_tensor_is_aligned_to_its_elements() -> None:
    tensors = {f"{i}": example(dtype, 3) for i, dtype in enumerate(DTYPES)}
    pieces, spans = encode_pieces(tensors)
    assert all(span.start % span.dtype.itemsize == 0 for span in spans)
    assert spans == read_spans(encode(tensors))
    assert b"".join(pieces) == encode(tensors)
    assert [len(piece) for piece in pieces[1:]] == [span.stop - span.start for span in spans]


def test_a_piece_is_the_memory_of_its_tensor() -> None:
    x = torch.zeros(4)
    pieces, _ = encode_pieces({"x": x})
    x.fill_(1)
    assert bytes(pieces[1]) == x.numpy().tobytes()


def test_a_bytearray_is_shared_and_bytes_are_copied() -> None:
    data = encode({"x": torch.zeros(4)})
    shared = bytearray(data)
    decode(shared)["x"].fill_(1)
    assert shared != data
    copy = decode(data)["x"]
    copy.fill_(1)
    assert torch.equal(decode(data)["x"], torch.zeros(4))


def test_unaligned_objects_of_other_writers_are_read() -> None:
    header = {"x": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    text += b" " * (3 - len(text) % 4)  # data begins at an odd place
    data = bytearray(build(text, (7).to_bytes(4, "little") + (9).to_bytes(4, "little")))
    assert decode(data)["x"].tolist() == [7, 9]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"z": torch.zeros(2, dtype=torch.complex64)}, r"tensor 'z' \(torch.complex64.*convert"),
        ({"s": torch.zeros(2, 2).to_sparse()}, "tensor 's' .*sparse.*dense"),
        ({"__metadata__": torch.zeros(1)}, "reserves"),
    ],
)
def test_what_a_shard_cannot_hold(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        encode(tensors)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes, expected at least 8"),
        (b"\xff" * 8, "a header of"),
        (build(b"{", b"")[:-1], "a header of 1 bytes in an object of 8"),
        (build(b"{nonsense"), "header is not JSON"),
        (build(b"[" * 100_000), "header is not JSON"),
        (build([]), "not a JSON object"),
        (build(b'{"a":1,"a":2}'), "a name occurs twice"),
        (build({"x": 3}), "no dtype, shape and data_offsets"),
        (build({"x": ONE | {"more": 1}}, b"1234"), "no dtype, shape"),
        (build({"x": ONE | {"dtype": "C64"}}, b"1234"), "dtype 'C64', expected one of"),
        (build({"x": ONE | {"shape": [-1]}}, b"1234"), r"shape \[-1\]"),
        (build({"x": ONE | {"shape": [True]}}, b"1234"), "shape"),
        (build({"x": ONE | {"shape": [2]}}, b"1234"), "has 4 bytes, expected 8"),
        (build({"x": ONE | {"data_offsets": [4]}}, b"1234"), "data_offsets"),
        (build({"x": ONE | {"data_offsets": [4, 8]}}, b"12345678"), r"begins at byte \d+, expected"),
        (build({"x": ONE, "y": ONE}, b"1234"), "begins at byte"),
        (build({"x": ONE}, b"123"), "the tensors end at byte"),
        (build({"x": ONE}, b"12345"), "the tensors end at byte"),
        (build({"x": {"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}), "tensor 'x' of shape"),
        (build({"x": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\x02"), "neither 0 nor 1"),
    ],
)
def test_malformed_objects_are_named(data: bytes, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        decode(data)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_give_tensors_or_a_shard_error(data: st.DataObject) -> None:
    whole = bytearray(encode({"x": torch.arange(3), "flag": torch.tensor([True, False])}))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        tensors = decode(whole[: data.draw(st.integers(0, len(whole)))])
    except ShardError:
        return
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
