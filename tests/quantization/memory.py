"""What a model's weights take, by the plan and as loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from tgi_server.checkpoint.headers import stored_tensors
from tgi_server.config import ModelConfig
from tgi_server.layers.linear import Linear
from tgi_server.layers.norm import RMSNorm
from tgi_server.layers.product import Dense, Int8, Product, Quantised, SideBySide
from tgi_server.layers.segmented import Segmented
from tgi_server.models.decoder import Decoder
from tgi_server.quantization.contents import contents_of
from tgi_server.weight_bytes import weights_bytes


def planned_bytes(folder: Path, *, on_gpu: bool = False, with_headers: bool = True) -> int:
    config = ModelConfig.from_folder(folder)
    tensors = stored_tensors(folder) if with_headers else {}
    return weights_bytes(config, contents_of(config.raw, folder, tensors), 1, on_gpu=on_gpu)


def loaded_bytes(model: Decoder) -> int:
    """Of embedding, products and norms."""
    parameters = [model.embedding.table, model.norm.weight]
    parameters += [norm.weight for block in model.blocks for norm in (block.attention_norm, block.mlp_norm)]
    held = [tensor for product in products_of(model) for tensor in tensors_of(product)]
    orders = [
        layer.order for layer in model.modules() if isinstance(layer, RMSNorm) and layer.order is not None
    ]
    return sum(tensor.nbytes for tensor in [*parameters, *held, *orders])


def products_of(model: Decoder) -> list[Product]:
    return [layer.product for layer in model.modules() if isinstance(layer, Linear)]


def tensors_of(product: Product) -> Iterator[Tensor]:
    if isinstance(product, SideBySide):
        for part in product.products:
            yield from tensors_of(part)
        return
    assert isinstance(product, (Dense, Int8, Quantised, Segmented))
    if isinstance(product, Segmented):
        yield from [] if product.order is None else [product.order]
    parts = product.parts if isinstance(product, Segmented) else [product.packed]
    yield from (value for part in parts for value in vars(part).values() if isinstance(value, Tensor))
