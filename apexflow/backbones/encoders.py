"""Text encoders and autoencoder of a backbone, each read from its folder when it is first called for.

Training from a finished cache calls for neither, but for its previews: they are decoded, and prompts of their own encoded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from apexflow.backbones.parts import Later
from apexflow.backbones.precision import bytes_of
from apexflow.backbones.text import device_of

ROLES = ("vae", "text_encoder")


class Encoders:
    """Base of the families, with `vae` and `text_encoder`: one module, or a ModuleDict of several."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        """parts: by the names of their folders; networks, or `Later`."""
        self._parts = {role: {n: part for n, part in parts.items() if n.startswith(role)} for role in ROLES}

    @cached_property
    def vae(self) -> Any:
        return self._first("vae")

    @cached_property
    def text_encoder(self) -> Any:
        return self._first("text_encoder")

    @property
    def vae_config(self) -> Any:
        """The autoencoder's config, known before its weights are read."""
        return self._parts["vae"]["vae"].config

    @property
    def encoder_bytes(self) -> int:
        """What the weights of all of them take, read or not."""
        parts = [part for role in ROLES for part in self._parts[role].values()]
        return sum(part.bytes if isinstance(part, Later) else bytes_of(part) for part in parts)

    def _first(self, role: str) -> Any:
        networks = {n: part.read() if isinstance(part, Later) else part for n, part in self._parts[role].items()}
        return next(iter(networks.values())) if len(networks) == 1 else nn.ModuleDict(networks)

    def _is_later(self, role: str) -> bool:
        return all(isinstance(part, Later) for part in self._parts[role].values())

    @contextmanager
    def encoders_on(self, device: torch.device) -> Iterator[None]:
        """Within, both stand on `device`, where they go when they are read; afterwards on the CPU.

        A text encoder that was read from a folder is let go: it is large, and a cache answers from then on.
        """
        self.place(device)
        try:
            yield
        finally:
            if self._is_later("text_encoder"):
                vars(self).pop("text_encoder", None)
            self.place(torch.device("cpu"))

    @contextmanager
    def autoencoder_on(self, device: torch.device) -> Iterator[None]:
        """Within, the autoencoder stands on `device`, read now if it was not yet; afterwards where it stood, even where `device`
        had no room for all of it."""
        stood = device_of(self.vae)
        try:
            self.vae.to(device)
            yield
        finally:
            self.vae.to(stood)

    def place(self, device: torch.device, roles: Sequence[str] = ROLES) -> None:
        """Put the encoders on `device`; one that is not read yet goes there when it is."""
        for role in roles:
            for part in self._parts[role].values():
                if isinstance(part, Later):
                    part.device = device
            if role in vars(self) or not self._is_later(role):
                getattr(self, role).to(device)

    def encoders_to_save(self) -> dict[str, Any]:
        """By the names of their folders: `Later` for what is as it was read, else the network that stands there now.

        A network that was read is compared with its files, which are read again for that: a hash of some of its values might
        miss what was changed in place, such as one token's embedding.
        """
        saved: dict[str, Any] = {}
        for role in ROLES:
            present = vars(self).get(role)
            if present is None and self._is_later(role):
                saved |= self._parts[role]
                continue
            present = getattr(self, role)
            networks = dict(present.items()) if isinstance(present, nn.ModuleDict) else {role: present}
            for name, network in networks.items():
                part = self._parts[role].get(name)
                saved[name] = part if isinstance(part, Later) and _is_as_read(network, part) else network
        return saved


def _is_as_read(network: nn.Module, part: Later) -> bool:
    """Whether a network still is what its folder holds: names, types and values."""
    read, held = part.read().state_dict(), network.state_dict()
    return read.keys() == held.keys() and all(
        held[name].dtype == tensor.dtype and torch.equal(held[name].to(tensor.device), tensor)
        for name, tensor in read.items()
    )
