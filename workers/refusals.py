"""What engines cannot do for a model, refused by name at its load. Above: their `opening.py`, `host.py`."""

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


def refuse_beams(spec: LoadSpec, models: str) -> None:
    """Refuse several beams for what does not write speech down.

    Args:
        models: what such models are called, e.g. "embedding models".

    Raises:
        UnsupportedParameter: more than one beam is asked for.
    """
    if spec.beams > 1:
        raise UnsupportedParameter(
            f"{spec.model}: {models} have no beams; those that write speech down do.", param="beams"
        )
