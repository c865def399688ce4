"""A narrower model: an ordinary one of its class, cut along its hidden size, its FFN units and its attention heads.

No family is named. What lies along each dimension of a tensor follows from what grows in a model that is built with
other widths, and from where a matrix sits in its block. Then it is proven: with hidden numbers, FFN units and heads in
another order the model must compute the same. A family of which that is not so is refused.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.decomposers import Statistics, Target, moment_of
from compresskit.errors import UnreachableError, one_line
from compresskit.model.inputs import fitted
from compresskit.model.kept import mode_kept
from compresskit.model.positions import shortened
from compresskit.model.rebuilt import built, rebuilt, shapes
from compresskit.model.targets import block_prefixes, count_parameters, find_targets

#: Hidden sizes, FFN units and channels of a head are multiples of this: kernels are made for such.
STEP = 8
#: Entries of a configuration that follow the hidden size where they equal it.
_ALSO_HIDDEN = ("embedding_size", "pooler_hidden_size")
#: Tokens that are run to prove what lies where: whole blocks of every family.
_TOKENS = 64
_HIDDEN, _HEADS = "hidden", "heads"


class Widths(NamedTuple):
    """The widths that are cut.

    Attributes:
        hidden: size of the hidden states.
        ffn: units of a block's FFN.
        heads: of a block's attention.
    """

    hidden: int
    ffn: int
    heads: int


class _Axis(NamedTuple):
    """What lies along one dimension of a tensor.

    Attributes:
        name: ``hidden``; the name of a half of a block, for its FFN units or the channels of its heads, one head after
            the other; ``heads`` for the heads themselves, in a table that all blocks read.
        parts: so many times behind each other (query, key and value in one matrix: 3).
    """

    name: str
    parts: int = 1


class _Half(NamedTuple):
    """The attention or the FFN of a block. All its matrices read the hidden state but the last one, which writes it."""

    name: str
    is_ffn: bool
    readers: Sequence[Target]
    writer: Target

    @property
    def inside(self) -> int:
        """Its FFN units, or the channels of all its heads."""
        return self.writer.shape[1]


class Anatomy:
    """Where the widths of a model lie.

    Attributes:
        model: the model.
        widths: that it has.

    Raises:
        UnreachableError: it cannot be told what its dimensions are, so that it cannot be cut.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._halves = self._find_halves()
        ffn = {half.inside for half in self._halves if half.is_ffn}
        hidden, heads = (getattr(model.config, name, None) for name in ("hidden_size", "num_attention_heads"))
        if not isinstance(hidden, int) or not isinstance(heads, int) or len(ffn) != 1:
            raise self._refused("hidden_size, heads and FFN are not the same for all layers")
        self.widths = Widths(hidden, ffn.pop(), heads)
        self._check_halves()
        self._ffn_setting = self._find_ffn_setting()
        self._axes = self._find_axes()
        self._whole_heads = self._prove()

    def _refused(self, why: str) -> UnreachableError:
        return UnreachableError(f"{type(self.model).__name__}: its widths cannot be cut: {why}")

    # -- what lies where --------------------------------------------------------------------------------------------

    def _find_halves(self) -> list[_Half]:
        targets = [target for target in find_targets(self.model) if target.kind == "linear"]
        found = []
        for block in block_prefixes(self.model):
            for role in ("attention", "ffn"):
                own = [target for target in targets if target.role == role and target.name.startswith(block)]
                if len(own) < 2:
                    raise self._refused(f"{block.rstrip('.')} has {len(own)} matrices of role {role}, not two or more")
                found.append(_Half(f"{role} {block}", role == "ffn", own[:-1], own[-1]))
        if not found:
            raise self._refused("it has no repeated blocks")
        return found

    def _check_halves(self) -> None:
        hidden, _, heads = self.widths
        for half in self._halves:
            for reader in half.readers:
                if reader.shape[1] != hidden or reader.shape[0] % half.inside:
                    raise self._refused(f"{reader.name} is {reader.shape[0]}x{reader.shape[1]}")
            if half.writer.shape[0] != hidden or (not half.is_ffn and half.inside % heads):
                raise self._refused(f"{half.writer.name} is {half.writer.shape[0]}x{half.inside}")

    def _find_ffn_setting(self) -> str:
        """The entry of the configuration that says how many units an FFN has."""
        writer = next(half.writer for half in self._halves if half.is_ffn)
        for name, value in self.model.config.to_dict().items():
            if type(value) is int and value == self.widths.ffn:
                config = copy.deepcopy(self.model.config)
                with suppress(Exception):  # every family checks its sizes in its own way
                    setattr(config, name, 3 * value)
                    if shapes(self.model, config)[f"{writer.name}.weight"][1] == 3 * value:
                        return name
        raise self._refused("its configuration does not say how many units an FFN has")

    def _config(self, widths: Widths) -> Any:
        """The configuration of the model with other widths."""
        config = copy.deepcopy(self.model.config)
        for name in ("hidden_size", *_ALSO_HIDDEN):
            if getattr(config, name, None) == self.widths.hidden:
                setattr(config, name, widths.hidden)
        config.num_attention_heads = widths.heads
        setattr(config, self._ffn_setting, widths.ffn)
        return config

    def _find_axes(self) -> dict[str, tuple[_Axis | None, ...]]:
        """What lies along every dimension of every tensor; None where nothing is cut."""
        hidden, ffn, heads = self.widths
        try:
            grown = shapes(self.model, self._config(Widths(2 * hidden, 3 * ffn, 2 * heads)))
        except Exception as error:  # every family checks its sizes in its own way
            raise self._refused(f"no model of other widths can be built: {one_line(error)}") from None
        inside = self._inside_attention()
        found: dict[str, tuple[_Axis | None, ...]] = {}
        for name, tensor in self.model.state_dict().items():
            wanted = grown.get(name, ())
            if len(wanted) != tensor.dim():
                raise self._refused(f"{name} has another form in a wider model")
            axes = []
            for place, (size, larger) in enumerate(zip(tensor.shape, wanted, strict=True)):
                axis: _Axis | None = None
                if larger == 3 * size and size % ffn == 0:
                    block = next((half.name for half in self._halves if half.is_ffn and _lies_in(name, half)), None)
                    axis = None if block is None else _Axis(block, size // ffn)
                elif larger == 2 * size and name in inside:
                    axis = inside[name][place]
                elif larger == 2 * size and size in (hidden, heads):
                    axis = _Axis(_HIDDEN if size == hidden else _HEADS)
                if axis is None and larger != size:
                    raise self._refused(f"{name} hangs on them in a way that is not known")
                axes.append(axis)
            found[name] = tuple(axes)
        return found

    def _inside_attention(self) -> dict[str, tuple[_Axis, ...]]:
        """What lies along the dimensions of the tensors of the attention matrices."""
        found: dict[str, tuple[_Axis, ...]] = {}
        hidden = _Axis(_HIDDEN)
        for half in self._halves:
            if half.is_ffn:
                continue
            for reader in half.readers:
                channels = _Axis(half.name, reader.shape[0] // half.inside)
                for name in (reader.name, *reader.shared):
                    found |= {f"{name}.weight": (channels, hidden), f"{name}.bias": (channels,)}
            for name in (half.writer.name, *half.writer.shared):
                found |= {f"{name}.weight": (hidden, _Axis(half.name)), f"{name}.bias": (hidden,)}
        return found

    @property
    def _has_table(self) -> bool:
        """Whether a table has a column for each head, so that all blocks keep the same ones."""
        return any(axis is not None and axis.name == _HEADS for axes in self._axes.values() for axis in axes)

    # -- the proof --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _prove(self) -> bool:
        """Run a copy with random weights before and after everything was put in another order.

        Returns:
            Whether a head can only be kept whole, since its channels have places of their own (rotary positions).

        Raises:
            UnreachableError: the outputs differ.
        """
        trial: Any = copy.deepcopy(self.model.base_model).cpu().float().eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in trial.parameters():  # strong enough that each place matters
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
        before, tensors = _outputs(trial), {name: tensor.clone() for name, tensor in trial.state_dict().items()}
        prefix = "" if self.model.base_model is self.model else f"{self.model.base_model_prefix}."
        for whole in (False, True):
            order = self._shuffled(generator, whole=whole)
            trial.load_state_dict({name: self._take(prefix + name, tensor, order) for name, tensor in tensors.items()})
            if _alike(before, _outputs(trial), order[_HIDDEN]):
                return whole
        raise self._refused("its outputs change when hidden numbers, FFN units and heads come in another order")

    def _shuffled(self, generator: torch.Generator, *, whole: bool) -> dict[str, Tensor]:
        hidden, ffn, heads = self.widths

        def shuffle(count: int) -> Tensor:
            return torch.randperm(count, generator=generator)

        order = {_HIDDEN: shuffle(hidden), _HEADS: shuffle(heads)}
        for half in self._halves:
            if half.is_ffn:
                order[half.name] = shuffle(ffn)
                continue
            size = half.inside // heads
            places = [torch.arange(size) if whole else shuffle(size) for _ in range(heads)]
            order[half.name] = _channels(order[_HEADS] if self._has_table else shuffle(heads), places, size)
        return order

    def _take(self, name: str, tensor: Tensor, order: Mapping[str, Tensor]) -> Tensor:
        """The entries of a tensor that ``order`` names, in its order."""
        for place, axis in enumerate(self._axes[name]):
            if axis is not None:
                chosen, size = order[axis.name].to(tensor.device), tensor.shape[place] // axis.parts
                chosen = torch.cat([chosen + part * size for part in range(axis.parts)])
                tensor = tensor.index_select(place, chosen)
        return tensor

    # -- the cut ----------------------------------------------------------------------------------------------------

    def parameters(self, widths: Widths) -> int:
        """How many a model of these widths has."""
        return count_parameters(built(self.model, self._config(widths)))

    def find_widths(self, parameters: float) -> Widths:
        """The widths of a model with at most so many parameters.

        The hidden size is the largest multiple of :data:`STEP` with which an FFN in proportion fits; heads are as few
        as leave each no more channels than it has now; the FFN then takes what is left.

        Raises:
            UnreachableError: the narrowest model is larger.
        """
        hidden, ffn, _ = self.widths
        # Where a hidden size equals another one, families leave the projection between them out.
        settings = self.model.config.to_dict().items()
        others = {size for name, size in settings if type(size) is int and name.endswith(("_size", "_dim"))}
        sizes = [size for size in range(STEP, hidden, STEP) if self._heads(size) and size not in others]
        if not sizes:
            raise self._refused(f"no smaller hidden size than {hidden} can be shared out among its heads")

        def of(size: int, units: int) -> Widths:
            return Widths(size, units, self._heads(size))

        def in_proportion(size: int) -> int:
            return min(ffn, max(STEP, ffn * size // hidden // STEP * STEP))

        fitting = bisect_right(sizes, parameters, key=lambda size: self.parameters(of(size, in_proportion(size))))
        found = sizes[max(fitting - 1, 0)]
        units = range(STEP, ffn + 1, STEP) if ffn >= STEP else range(ffn, ffn + 1)
        fitting = bisect_right(units, parameters, key=lambda count: self.parameters(of(found, count)))
        if not fitting:
            least = of(found, units[0])
            raise UnreachableError(
                f"{parameters:,.0f} parameters would be left, but the narrowest model (hidden size {least.hidden}, FFN "
                f"{least.ffn}, heads {least.heads}) has {self.parameters(least):,}"
            )
        return of(found, units[fitting - 1])

    def _heads(self, hidden: int) -> int:
        """How many heads a hidden size is shared out among, each of multiples of :data:`STEP` channels where
        each has so now; 0: it cannot be.
        """
        each = max(1, self.widths.hidden // self.widths.heads)
        if self._whole_heads:
            return hidden // each if hidden % each == 0 else 0
        step = 1 if each % STEP else STEP
        counts = range(-(-hidden // each), self.widths.heads + 1)
        return next((count for count in counts if hidden % (count * step) == 0), 0)

    @torch.no_grad()
    def narrowed(self, widths: Widths, statistics: Statistics | None = None) -> PreTrainedModel:
        """A model of these widths with what matters most of this one.

        A hidden number, an FFN unit or a channel of a head matters as much as what it adds to the outputs of the
        matrices that read it: the squared length of its column, times the mean square of what it holds on the
        calibration's text where there are statistics. Every matrix counts alike; a head is the sum of its channels.

        Raises:
            UnreachableError: a tensor of a narrower model is not a part of this one's.
        """
        config = self._config(widths)
        wanted = shapes(self.model, config)
        order = self._best(widths, wanted, self._worth(statistics))
        tensors = {name: self._take(name, tensor, order) for name, tensor in self.model.state_dict().items()}
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != wanted.get(name):
                raise self._refused(f"{name} is not cut as its configuration says")
        narrow = rebuilt(self.model, config, tensors)
        with mode_kept(narrow):
            try:
                _outputs(narrow.base_model.eval())
            except Exception as error:  # a size that follows from others may stand in the configuration too
                raise self._refused(f"a narrower model does not run: {one_line(error)}") from None
        return narrow

    def _worth(self, statistics: Statistics | None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for target in find_targets(self.model):
            axis = self._axes[f"{target.name}.weight"][1]
            if target.kind != "linear" or axis is None:
                continue
            weight: Any = self.model.get_submodule(target.name).weight
            worth = weight.detach().float().cpu().square().sum(0)
            moment = moment_of(target, statistics)
            if moment is not None:
                worth = worth * moment.diagonal().float().cpu()
            worth = worth / worth.sum().clamp(min=torch.finfo(worth.dtype).tiny)
            found[axis.name] = found.get(axis.name, torch.zeros_like(worth)) + worth
        return found

    def _best(
        self, widths: Widths, wanted: Mapping[str, tuple[int, ...]], worth: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What is kept along every axis, in its old order."""
        order = {_HIDDEN: _largest(worth[_HIDDEN], widths.hidden)}
        of_heads = {half.name: worth[half.name].view(self.widths.heads, -1) for half in self._halves if not half.is_ffn}
        order[_HEADS] = _largest(torch.stack([each.sum(1) for each in of_heads.values()]).sum(0), widths.heads)
        for half in self._halves:
            if half.is_ffn:
                order[half.name] = _largest(worth[half.name], widths.ffn)
                continue
            channels = of_heads[half.name]
            kept = order[_HEADS] if self._has_table else _largest(channels.sum(1), widths.heads)
            size = wanted[f"{half.writer.name}.weight"][1] // widths.heads
            places = [_largest(channels[head], size) for head in kept]
            order[half.name] = _channels(kept, places, channels.shape[1])
        return order


def _lies_in(name: str, half: _Half) -> bool:
    """Whether a tensor lies in the block of a half."""
    return name.startswith(half.name.partition(" ")[2])


def _channels(heads: Tensor, places: Sequence[Tensor], size: int) -> Tensor:
    """The channels at these places of these heads, each of ``size`` channels."""
    return torch.cat([head * size + inside for head, inside in zip(heads, places, strict=True)])


def _largest(worth: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest are; of equal ones the first."""
    return worth.argsort(descending=True, stable=True)[:count].sort().values


def _outputs(base: Any) -> list[Tensor]:
    """What an encoder gives for a sequence of the first words of its vocabulary."""
    ids = torch.arange(shortened(base, _TOKENS), device=base.device)[None] % base.config.vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # BigBird attends to random blocks
        found = base(**fitted(base, {"input_ids": ids}), return_dict=True)
    return [value for value in found.values() if isinstance(value, Tensor)]


def _alike(before: Sequence[Tensor], after: Sequence[Tensor], hidden: Tensor) -> bool:
    """Whether outputs are those from before, with the hidden numbers in their new order."""
    for ours, theirs in zip(before, after, strict=True):
        expected = ours[..., hidden] if ours.shape[-1] == len(hidden) else ours
        if not torch.allclose(theirs, expected, rtol=0, atol=1e-2 * float(expected.std())):
            return False
    return True
