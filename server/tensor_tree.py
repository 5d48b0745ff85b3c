"""Nested dicts, lists and tuples of tensors and numbers, as flat named tensors and JSON; never pickle.

An optimizer's ``state_dict`` is such a tree. Its shape differs from one optimizer to the next and is not assumed here.
"""

from typing import Any

import torch
from torch import Tensor


def flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Part ``tree`` into a JSON value and tensors named by their path, such as ``model.items.weight``.

    Tensors are copied: safetensors refuses those that share memory. Raises :class:`TypeError` for a leaf that is
    neither a tensor nor None, bool, int, float or str.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(tree, "", tensors), tensors


def unflatten(json_value: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that :func:`flatten` parted, equal in every type and bit."""
    if not isinstance(json_value, dict):
        return json_value
    [(kind, content)] = json_value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(inner, tensors) for key, inner in content}
    inner_values = [unflatten(inner, tensors) for inner in content]
    return tuple(inner_values) if kind == "tuple" else inner_values


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        while path in tensors:  # {"a.b": …, "a": {"b": …}} lead to the same path
            path += "'"
        tensors[path] = value.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}
    prefix = f"{path}." if path else ""
    if isinstance(value, dict):  # pairs, since JSON's own keys would turn 0 into "0"
        return {"dict": [[key, _encode(inner, f"{prefix}{key}", tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(inner, f"{prefix}{index}", tensors) for index, inner in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"Expected {path} to be a tensor, number or string, not {type(value).__name__}.")
