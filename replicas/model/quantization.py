"""Quantisation: the weights of a decoder in fewer bits, made while a checkpoint is loaded.

What is quantised are the projections of every layer, nearly all of the bytes that a step reads. The
head stays wide, since nothing comes after it that could even its errors out before they choose
tokens; norms and embedding, of which a step reads next to nothing; and the draft adapter: it is
small, and in this way draft and verify share the quantised weights and differ in the adapter alone.
"""

import torch

from trimode.replicas.errors import CheckpointError, ConfigError
from trimode.replicas.model.layers import Projection
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel

QUANTIZATIONS = ("fp8",)
FP8_CAPABILITY = (8, 9)


def check_quantization(quantization: str | None, device: torch.device) -> None:
    """Raises ConfigError where this quantization is none, or none for the device."""
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise ConfigError(
            f"quantization {quantization!r} is not supported; leave it out or: {known}"
        )
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < FP8_CAPABILITY:
            raise ConfigError(
                f"quantization fp8 needs a GPU of compute capability 8.9 or above (Ada, Hopper, "
                f"Blackwell), this one has {major}.{minor}; leave the setting out to serve bfloat16"
            )


class Quantiser:
    """Quantises each projection as soon as its last tensor is in, so that little more than one wide
    weight at a time lies beside the quantised ones.

    Wide weights are therefore read into the host's memory, which the system hands out only as it is
    written to.
    """

    def __init__(self, model: NemotronLabsDiffusionModel, device: torch.device) -> None:
        """model: on the meta device."""
        self._device = device
        self._parts: dict[str, tuple[Projection, dict[str, int]]] = {}
        self._missing: dict[Projection, set[str]] = {}
        for projection, rows in model.decoder_projections():
            self._missing[projection] = set(rows)
            self._parts |= dict.fromkeys(rows, (projection, rows))

    def place(self, model: NemotronLabsDiffusionModel) -> None:
        """Give every weight memory, not yet filled: what is to be quantised on the host, all else
        on the device.
        """
        for module in model.modules():
            device = torch.device("cpu") if module in self._missing else self._device
            module.to_empty(device=device, recurse=False)

    def filled(self, name: str) -> None:
        """A published tensor is in its place. Raises CheckpointError where it is not finite."""
        if name not in self._parts:
            return
        projection, rows = self._parts[name]
        missing = self._missing[projection]
        missing.discard(name)
        if missing:
            return
        finite = projection.quantise(self._device).scales.isfinite()
        for part, is_finite in zip(rows, finite.split(list(rows.values())), strict=True):
            if not is_finite.all():
                raise CheckpointError(
                    f"tensor {part} holds NaN or an infinity and cannot be quantised"
                )
