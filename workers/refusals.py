"""What engines that generate no text cannot do for a model, refused by name at its load. Above: their `opening.py`."""

from __future__ import annotations

from hostler.errors import UnsupportedParameter

from workers.engine import LoadSpec


def refuse_text_options(spec: LoadSpec, models: str) -> None:
    """Refuse options of a load that only text models have.

    Args:
        models: what such models are called, e.g. "embedding models".

    Raises:
        UnsupportedParameter: names the option.
    """
    if spec.quantize:
        raise UnsupportedParameter(f"{spec.model}: {models} are not quantized here.", param="quantize")
    if spec.adapters:
        raise UnsupportedParameter(f"{spec.model}: {models} take no adapters here.", param="adapters")
    if len(spec.devices) > 1:
        raise UnsupportedParameter(f"{spec.model}: {models} are not split over devices.", param="devices")
