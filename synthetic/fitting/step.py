"""A chunk of training steps as one jitted call: one seed or several, one device or many."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from synthetic.compilation import full_effort
from synthetic.fitting import devices
from synthetic.fitting.recipe import NUMBERS, Recipe, varied
from synthetic.fitting.weights_file import named, unnamed
from synthetic.tasks.task import Curriculum, Task, checked

RESERVED = ("step", "loss", "gradient_norm", "excess", "failed", "steps", "steps_per_second")


class TrainingState(NamedTuple):
    """All that changes from step to step; with several seeds, every array has a leading seed axis.

    Attributes:
        params: the module's `nnx.Param`s by dotted name.
        rest: its other state (counters, buffers).
        optimizer: the optax state.
        average: the averaged parameters, or None where the recipe has none.
    """

    params: dict[str, Array]
    rest: dict[str, Array]
    optimizer: Any
    average: dict[str, Array] | None


def seed_keys(seed: Array | int) -> tuple[Array, Array]:
    """The keys of a seed: for the initial weights, and for the data of all steps."""
    initial, data = jax.random.split(jax.random.key(jnp.asarray(seed, jnp.uint32)))
    return initial, data


@dataclass(frozen=True)
class Loop:
    """What is trained, on what and how; `init` and `compile` make the arrays and the loop.

    Attributes:
        model: a module, or a function from a key to one.
        task, predict, metrics, recipe, transformation, mesh: as in `fit`.
        seeds: the seeds.
        stacked: whether arrays have a seed axis (then `model` is a function).
        graphdef, params, rest: structure of the module, from one example of it.
        lanes: "recipe.NAME" or "task.NAME" -> the number of every seed, `[seed]`.
        programs: what was compiled, kept for other loops that differ in seeds and lanes alone.
    """

    model: nnx.Module | Callable[[Array], nnx.Module]
    task: Task
    predict: Callable[..., Any]
    metrics: Callable[[Any], Mapping[str, Any]] | None
    recipe: Recipe
    transformation: optax.GradientTransformation
    mesh: Mesh | None
    seeds: tuple[int, ...]
    stacked: bool
    graphdef: Any
    params: Any
    rest: Any
    lanes: dict[str, np.ndarray] = field(default_factory=dict)
    programs: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Steps in a full chunk."""
        recipe = self.recipe
        return min(recipe.chunk, recipe.checkpoint_every, recipe.steps)

    def init(self) -> TrainingState:
        """The state before step 0, on the devices. The given model's arrays are copied."""

        def begin(params: dict[str, Array], rest: dict[str, Array]) -> TrainingState:
            average = params if self.recipe.averages else None
            return TrainingState(params, rest, self.transformation.init(params), average)

        def draw(seed: Array) -> TrainingState:
            assert not isinstance(self.model, nnx.Module)
            _, params, rest = nnx.split(self.model(seed_keys(seed)[0]), nnx.Param, ...)
            return begin(named(params), named(rest))

        if self.stacked:
            if "init" not in self.programs:
                self.programs["init"] = jax.jit(jax.vmap(draw))
            return self.lay_out(self.programs["init"](self._seeds()))
        return self.lay_out(begin(named(self.params), named(self.rest)))

    def lay_out(self, state: Any) -> Any:
        """Fresh device arrays, split over the mesh's seed axis where there are several seeds."""
        if self.mesh is not None:
            return devices.place(state, self._sharding())
        # Through numpy: fresh buffers (they will be donated) that carry no weak types.
        return jax.tree.map(_copied, state)

    def host(self, state: TrainingState) -> TrainingState:
        """The state as numpy arrays, whole on every process."""
        if self.mesh is not None and jax.process_count() > 1:
            state = jax.jit(lambda x: x, out_shardings=devices.replicated(self.mesh))(state)
        return jax.tree.map(np.asarray, state)

    def modules(self, state: TrainingState, averaged: bool) -> list[nnx.Module]:
        """One module per seed from a host state."""
        params = state.average if averaged and state.average is not None else state.params

        def module(index: int) -> nnx.Module:
            pick = (lambda x: x[index]) if self.stacked else (lambda x: x)
            arrays = jax.tree.map(lambda x: _copied(pick(x)), (params, state.rest))
            return self._merge(*arrays)

        return [module(index) for index in range(len(self.seeds))]

    def compile(self, state: TrainingState) -> Callable[[TrainingState, int, int], Any]:
        """Compiles the chunk: `(state, start, stop) -> state, report`; the given state is consumed.

        `report` holds "loss" and "gradient_norm" of every step, `[chunk]` or `[chunk, seed]` (rows
        from `stop - start` on are padding), "finite", and "metrics" after the last step.
        """
        # A task that is a pytree hands its arrays over as arguments, not as constants.
        leaves, structure = jax.tree.flatten(self.task)
        dynamic = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        static = [None if moves else leaf for leaf, moves in zip(leaves, dynamic, strict=True)]
        arrays = [np.asarray(leaf) for leaf, moves in zip(leaves, dynamic, strict=True) if moves]

        def chunk(
            state: TrainingState, seeds: Any, arrays: list[Array], start: Array, stop: Array
        ) -> tuple[TrainingState, dict[str, Any]]:
            given = iter(arrays)
            merged = [
                next(given) if moves else leaf for leaf, moves in zip(static, dynamic, strict=True)
            ]
            task = jax.tree.unflatten(structure, merged)
            numbers, lanes = seeds
            return self._chunk(state, numbers, lanes, task, start, stop)

        seeds: Any = (self._seeds() if self.stacked else self._seeds()[0], self.lanes)
        options: dict[str, Any] = {"donate_argnums": 0}
        if self.mesh is not None:
            whole = devices.replicated(self.mesh)
            arrays, seeds = devices.place(arrays, whole), devices.place(seeds, whole)
            options["out_shardings"] = (self._sharding(), whole)
        else:
            arrays = jax.device_put(arrays)
        bounds = (np.int32(0), np.int32(0))
        if "chunk" not in self.programs:
            lowered = jax.jit(chunk, **options).lower(state, seeds, arrays, *bounds)
            self.programs["chunk"] = lowered.compile(full_effort() or None)
        run = self.programs["chunk"]
        return lambda state, a, b: run(state, seeds, arrays, np.int32(a), np.int32(b))

    def _chunk(
        self,
        state: TrainingState,
        seeds: Array,
        lanes: dict[str, Array],
        task: Task,
        start: Array,
        stop: Array,
    ) -> tuple[TrainingState, dict[str, Any]]:
        def step(state: TrainingState, key: Array, lane: dict[str, Array], index: Array) -> Any:
            own = varied(task, _of("task", lane)) if lane else task
            transformation = self.transformation
            if numbers := _of("recipe", lane):
                transformation = varied(self.recipe, numbers).transformation()
            key = jax.random.fold_in(key, index)
            return self._step(state, key, index, own, transformation)

        measure: Any = self._measure
        keys = seed_keys(seeds)[1] if not self.stacked else jax.vmap(seed_keys)(seeds)[1]
        if self.stacked:
            axis = None if self.mesh is None else devices.SEED
            step = jax.vmap(step, in_axes=(0, 0, 0, None), spmd_axis_name=axis)
            measure = jax.vmap(measure, spmd_axis_name=axis)
        trace = jnp.zeros((self.length, *seeds.shape))

        def body(index: Array, carry: Any) -> Any:
            state, losses, norms = carry
            state, loss, norm = step(state, keys, lanes, index)
            row = index - start
            return state, losses.at[row].set(loss), norms.at[row].set(norm)

        # Bounds are arguments, so that the last, shorter chunk runs the very same program.
        state, losses, norms = jax.lax.fori_loop(start, stop, body, (state, trace, trace))
        kept = [jnp.isfinite(leaf) for leaf in jax.tree.leaves((state.params, state.average))]
        if self.lanes:  # of each on its own
            kept = [leaf.reshape(len(leaf), -1) for leaf in kept]
        finite = jnp.stack([leaf.all(-1 if self.lanes else None) for leaf in kept]).all(0)
        report = {"loss": losses, "gradient_norm": norms, "finite": finite}
        return state, report | {"metrics": measure(state)}

    def _step(
        self, state: TrainingState, key: Array, index: Array, task: Task, transformation: Any
    ) -> Any:
        if isinstance(task, Curriculum):
            progress = index / max(self.recipe.steps - 1, 1)
            batch = checked(task, task.sample_during(key, self.recipe.batch, progress))
        else:
            batch = checked(task, task.sample(key, self.recipe.batch))
        if self.mesh is not None:
            split = NamedSharding(self.mesh, PartitionSpec(devices.DATA))
            batch = jax.lax.with_sharding_constraint(batch, split)

        def mean_loss(params: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
            model = self._merge(params, state.rest)
            losses = task.loss(self.predict(model, *batch.inputs), batch)
            if losses.shape != (self.recipe.batch,):
                raise ValueError(
                    f"task.loss: gave shape {losses.shape}, must be ({self.recipe.batch},), one "
                    "number per example"
                )
            after = named(nnx.split(model, nnx.Param, ...)[2])
            return losses.mean(), {name: after[name] for name in state.rest}

        (loss, rest), gradient = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, optimizer = transformation.update(gradient, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            weight = self.recipe.average_weight(index)
            average = {
                name: (old + weight * (params[name] - old)).astype(old.dtype)
                for name, old in average.items()
            }
        return TrainingState(params, rest, optimizer, average), loss, optax.tree.norm(gradient)

    def _measure(self, state: TrainingState) -> dict[str, Array]:
        if self.metrics is None:
            return {}
        params = state.params if state.average is None else state.average
        measured = dict(self.metrics(self._merge(params, state.rest)))
        for name, value in measured.items():
            if jnp.shape(value) != ():
                raise ValueError(f"metrics: {name} has shape {jnp.shape(value)}, must be a scalar")
            if name in RESERVED:
                raise ValueError(f"metrics: {name!r} is already a field of every record")
        return measured

    def _merge(self, params: Mapping[str, Array], rest: Mapping[str, Array]) -> nnx.Module:
        states = unnamed(params, self.params), unnamed(rest, self.rest)
        return nnx.merge(self.graphdef, *states)

    def _seeds(self) -> np.ndarray:
        return np.asarray(self.seeds, np.uint32)

    def _sharding(self) -> NamedSharding:
        assert self.mesh is not None
        axes = (devices.SEED,) if self.stacked else ()
        return NamedSharding(self.mesh, PartitionSpec(*axes))


def _of(kind: str, lane: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a recipe, or of a task, by the names of its fields."""
    parts = {name.partition(".")[::2]: value for name, value in lane.items()}
    return {name: value for (whose, name), value in parts.items() if whose == kind}


def _copied(leaf: Any) -> Array:
    """A copy on the device; `jnp.array` would compile a program for each shape."""
    return jax.device_put(np.asarray(leaf), may_alias=False)


def make_loop(
    model: nnx.Module | Callable[[Array], nnx.Module],
    task: Task,
    recipe: Recipe,
    *,
    predict: Callable[..., Any] | None,
    metrics: Callable[[Any], Mapping[str, Any]] | None,
    transformation: optax.GradientTransformation | None,
    seed: int,
    seeds: Sequence[int] | None,
    mesh: Mesh | None,
    lanes: Mapping[str, Sequence[float]] | None = None,
    programs: dict[str, Any] | None = None,
) -> Loop:
    """Checks the arguments of `fit` and gathers them; raises as `fit` does."""
    for value in (seed,) if seeds is None else seeds:
        if not 0 <= value < 2**32:
            raise ValueError(f"seed={value}: must be in 0..{2**32 - 1}")
    checked_lanes = _checked_lanes(lanes or {}, task, recipe, seeds, transformation)
    if seeds is not None and len(seeds) == 0:
        raise ValueError("seeds=[]: must hold at least one seed")
    if isinstance(model, nnx.Module):
        if seeds is not None:
            raise TypeError("model: with seeds, give a function from a key to a module")
        example = model
    elif callable(model):
        example = model(seed_keys(seed if seeds is None else seeds[0])[0])
    else:
        raise TypeError(f"model: must be an nnx.Module or a function to one, got {type(model)}")
    graphdef, params, rest = nnx.split(example, nnx.Param, ...)
    if not named(params):
        raise ValueError(f"model: {type(example).__name__} has no nnx.Param")
    if mesh is not None:
        for axis, size, name in (
            (devices.DATA, recipe.batch, "batch"),
            (devices.SEED, 1 if seeds is None else len(seeds), "number of seeds"),
        ):
            if size % mesh.shape[axis]:
                raise ValueError(
                    f"{name}={size}: must be a multiple of the {mesh.shape[axis]} devices along "
                    f"the mesh's {axis} axis"
                )
    return Loop(
        model=model,
        task=task,
        predict=predict or (lambda model, *inputs: model(*inputs)),
        metrics=metrics,
        recipe=recipe,
        transformation=transformation or recipe.transformation(),
        mesh=mesh,
        seeds=(seed,) if seeds is None else tuple(seeds),
        stacked=seeds is not None,
        graphdef=graphdef,
        params=params,
        rest=rest,
        lanes=checked_lanes,
        programs={} if programs is None else programs,
    )


def _checked_lanes(
    lanes: Mapping[str, Sequence[float]],
    task: Task,
    recipe: Recipe,
    seeds: Sequence[int] | None,
    transformation: Any,
) -> dict[str, np.ndarray]:
    """The lanes as arrays; ValueError for a name that cannot vary, or numbers of another count."""
    fixed = ("b1",) if recipe.optimizer == "sgd" else ()
    known = [f"recipe.{n}" for n in NUMBERS if n not in fixed and transformation is None]
    known += [f"task.{name}" for name in getattr(type(task), "NUMBERS", ())]
    for name, values in lanes.items():
        if name not in known:
            raise ValueError(f"lanes: {name!r}: must be one of {', '.join(known) or 'none'}")
        if seeds is None or len(values) != len(seeds):
            count = "no seeds" if seeds is None else f"{len(seeds)} seeds"
            raise ValueError(f"lanes: {name}: {len(values)} numbers for {count}")
    dtype = jnp.result_type(float)
    return {name: np.asarray(values, dtype) for name, values in lanes.items()}
