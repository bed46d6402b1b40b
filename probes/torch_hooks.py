"""A torch module as a `probes.foreign.Subject`, read and edited by forward hooks.

torch is imported where a module is wrapped, and nowhere else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from constructions.core.transformer import Edit
from probes.foreign import Subject


def from_torch(
    module: Any,
    inputs: Callable[..., Any] | None = None,
    output: Callable[[Any], Any] | None = None,
    sites: Mapping[str, Sequence[str]] | None = None,
    *,
    at_once: int = 4096,
) -> Subject:
    """A torch module as a `Subject`, read and edited by forward hooks; it stays as it is.

    It runs in evaluation mode, in the dtype and on the device of its parameters. Derivatives are
    torch's own, where its graph leads from the last input to the prediction.

        Subject of a linear attention on tokens (x, y), whose last column is minus the prediction:

        from_torch(
            module,
            inputs=lambda x, y, q: torch.cat([torch.cat([x, y], 2), pad(q, (0, y.shape[2]))], 1),
            output=lambda stream: -stream[:, -1:, -1:],
            sites={"residual": ["layers.0:input", "layers.0", "layers.1"]},
        )

    Args:
        module: of torch's.
        inputs: the construction's inputs as tensors -> the module's argument, or a tuple of them;
            None: they are its arguments.
        output: what the module gives -> the prediction; None: it is the prediction.
        sites: site -> for every layer the name of a submodule, whose output `[batch, token,
            feature]` it is (of a tuple the first); "name:input" is what goes in. A submodule that
            is called several times is named once for each call.
        at_once: inputs that are run together.

    Raises:
        ValueError: no module, a site of a submodule that does not exist; when it is run, a
            submodule that is called another number of times than it is named.
    """
    torch: Any = importlib.import_module("torch")
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"module is a {type(module).__name__}, must be a torch.nn.Module")
    known = dict(module.named_modules())
    places = {
        site: [_place(known, site, name) for name in ([named] if isinstance(named, str) else named)]
        for site, named in (sites or {}).items()
    }
    wrapped = _Hooked(torch, module, inputs, output, places, at_once)
    named = type(module).__name__
    if not places:
        return Subject(wrapped.predict, derivative=wrapped.derivative, name=named)
    return Subject(
        wrapped.predict, wrapped.activations, wrapped.edit, wrapped.derivative, name=named
    )


def _place(known: Mapping[str, Any], site: str, name: str) -> tuple[str, bool]:
    """(submodule, whether what goes in is meant)."""
    path, colon, side = name.partition(":")
    if path not in known or (colon and side != "input"):
        some = ", ".join(filter(None, known))
        raise ValueError(f"sites: {site}: {name!r}, must be one of {some}, or one with ':input'")
    return path, bool(colon)


class _Hooked:
    """The functions of a torch module."""

    def __init__(
        self,
        torch: Any,
        module: Any,
        inputs: Callable[..., Any] | None,
        output: Callable[[Any], Any] | None,
        places: Mapping[str, list[tuple[str, bool]]],
        at_once: int,
    ) -> None:
        self.torch, self.module, self.at_once = torch, module, at_once
        self.inputs, self.output, self.places = inputs, output, places

    def tensors(self, arrays: Sequence[Any]) -> list[Any]:
        """Arrays in the module's dtype and on its device."""
        like = next(self.module.parameters(), self.torch.zeros(()))
        found = [self.torch.as_tensor(np.array(a), device=like.device) for a in arrays]
        return [a.to(like.dtype) if a.is_floating_point() else a for a in found]

    def forward(self, tensors: Sequence[Any]) -> Any:
        """The prediction."""
        given = tuple(tensors) if self.inputs is None else self.inputs(*tensors)
        out = self.module(*(given if isinstance(given, tuple) else (given,)))
        return out if self.output is None else self.output(out)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode; afterwards every part is in the mode that it was in."""
        before = [(part, part.training) for part in self.module.modules()]
        self.module.eval()
        try:
            yield
        finally:
            for part, training in before:
                part.training = training

    def blocks(self, arrays: Sequence[Any]) -> Iterator[slice]:
        """Slices of the batch."""
        for start in range(0, len(arrays[0]), self.at_once):
            yield slice(start, start + self.at_once)

    def predict(self, *arrays: Any) -> np.ndarray:
        """See `Subject`."""
        with self.evaluating(), self.torch.no_grad():
            found = [
                self.forward(self.tensors([a[block] for a in arrays])).cpu().numpy()
                for block in self.blocks(arrays)
            ]
        return np.concatenate(found)

    def activations(self, *arrays: Any) -> dict[str, np.ndarray]:
        """See `Subject`."""
        return self.edit({}, *arrays)[1]

    def edit(
        self, edits: Mapping[str, Edit], *arrays: Any
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """See `Subject`."""
        predictions, values = [], []
        with self.evaluating(), self.torch.no_grad():
            for block in self.blocks(arrays):
                inside = {
                    site: [self.torch.as_tensor(np.array(a[:, block])) for a in edit]
                    for site, edit in edits.items()
                }
                with self.hooked(inside) as found:
                    out = self.forward(self.tensors([a[block] for a in arrays]))
                predictions.append(out.cpu().numpy())
                values.append(self.stacked(found))
        joined = {site: np.concatenate([v[site] for v in values], 1) for site in self.places}
        return np.concatenate(predictions), joined

    def stacked(self, found: Mapping[tuple[str, bool], list[Any]]) -> dict[str, np.ndarray]:
        """The values of every site, in the order of its layers."""
        result = {}
        for site, places in self.places.items():
            calls = {place: iter(found[place]) for place in places}
            layers = [next(calls[place], None) for place in places]
            for place in dict.fromkeys(places):
                # what goes into a later call comes out of an earlier one
                calls_named = places.count(place)
                if len(found[place]) < calls_named or (
                    len(found[place]) > calls_named and not place[1]
                ):
                    raise ValueError(
                        f"sites: {site}: {place[0]!r} is called {len(found[place])} times, and "
                        f"named {calls_named} times; it must be named for each call"
                    )
            if len({tuple(a.shape) for a in layers}) > 1:  # type: ignore[union-attr]
                shapes = ", ".join(str(list(a.shape)) for a in layers)  # type: ignore[union-attr]
                raise ValueError(f"sites: {site}: layers have shapes {shapes}, must have one")
            result[site] = np.stack([a.cpu().numpy() for a in layers])  # type: ignore[union-attr]
        return result

    @contextmanager
    def hooked(self, edits: Mapping[str, list[Any]]) -> Iterator[dict[tuple[str, bool], list[Any]]]:
        """Records, and edits, what goes into and comes out of the submodules of all sites."""
        found: dict[tuple[str, bool], list[Any]] = {}
        handles = []
        for place in {place for places in self.places.values() for place in places}:
            found[place] = []

            def edited(value: Any, place: tuple[str, bool] = place) -> Any:
                whole = value
                if isinstance(value, tuple):
                    if not value:
                        raise ValueError(f"sites: {place[0]!r} is called with names only, must be "
                                         "given what it reads as its first argument")  # fmt: skip
                    value = value[0]
                call = len(found[place])
                for site, (where, new) in edits.items():
                    layers = [n for n, p in enumerate(self.places[site]) if p == place]
                    if call < len(layers):
                        at = layers[call]
                        value = self.torch.where(
                            where[at].to(value.device), new[at].to(value), value
                        )
                found[place].append(value)
                return (value, *whole[1:]) if isinstance(whole, tuple) else value

            part = self.module.get_submodule(place[0])
            if place[1]:
                handles.append(part.register_forward_pre_hook(lambda _, given, e=edited: e(given)))
            else:
                handles.append(part.register_forward_hook(lambda _, __, out, e=edited: e(out)))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def derivative(self, *arrays: Any) -> np.ndarray | None:
        """See `Subject`."""
        found = []
        with self.evaluating():
            for block in self.blocks(arrays):
                tensors = self.tensors([a[block] for a in arrays])
                last = tensors[-1]
                if not last.is_floating_point():
                    return None
                tensors[-1] = last = last.requires_grad_()
                out = self.forward(tensors)
                if not out.requires_grad or out.ndim != 3 or out.shape[:2] != last.shape[:2]:
                    return None
                rows = [
                    [self.torch.autograd.grad(
                        out[:, t, o].sum(), last, retain_graph=True, allow_unused=True)[0]
                     for o in range(out.shape[2])]
                    for t in range(out.shape[1])
                ]  # fmt: skip
                if any(row is None for own in rows for row in own):
                    return None
                each = [[row[:, t] for row in own] for t, own in enumerate(rows)]
                found.append(np.stack([np.stack([r.cpu().numpy() for r in own], 1)
                                       for own in each], 1))  # fmt: skip
        return np.concatenate(found)
