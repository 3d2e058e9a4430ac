"""What transformers hands on instead of a tensor: nobody but us can compute with it."""

from __future__ import annotations

from typing import Any, NoReturn


class Opaque:
    """Stands for keys, values or a mask; a model that computes with them itself is refused."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise _not_replaceable(getattr(func, "__name__", str(func)))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _not_replaceable(name)


def _not_replaceable(operation: str) -> ValueError:
    moved = ""
    if operation == "to":  # accelerate moves what a layer is given
        moved = (
            "device_map: a PagedCache is on one device, and cannot follow a model over several, "
            "nor to layers that are offloaded (device_map={'': 'cuda:0'} can). Without that: "
        )
    return ValueError(
        f"{moved}a PagedCache has no {operation}: its keys and values are in pages, and no mask "
        "is made for them. Either it was made with another model's config, or this model computes "
        "with its cached keys itself instead of calling transformers' AttentionInterface (under "
        "this attn_implementation): try attn_implementation='sdpa', or use DynamicCache"
    )


def _refuse(name: str) -> Any:
    def refuse(*_: Any) -> NoReturn:
        raise _not_replaceable(name)

    return refuse


for _name in ("getitem", "matmul", "rmatmul", "add", "radd", "mul", "rmul", "sub", "truediv"):
    setattr(Opaque, f"__{_name}__", _refuse(f"__{_name}__"))
