"""Nested dicts, lists and tuples of tensors and numbers, as flat named tensors and JSON; never pickle.

An optimizer's ``state_dict`` is such a tree. Its shape differs from one optimizer to the next and is not assumed here.
"""

from typing import Any

from torch import Tensor


def flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Part ``tree`` into a JSON value and tensors named by their path, such as ``model.items.weight``.

    The tensors are contiguous and share no memory with each other, as safetensors wants them; a tensor that is so
    already is not copied. Raises :class:`TypeError` for a leaf that is neither a tensor nor None, bool, int, float or
    str.
    """
    tensors: dict[str, Tensor] = {}
    json_value = _encode(tree, "", tensors)
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in storages:
            tensors[name] = tensor.clone()
        storages.add(storage)
    return json_value, tensors


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
        tensors[path] = value.detach().contiguous()
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
