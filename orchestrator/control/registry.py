"""The one place that knows which models should exist: those of the config files (owned by people) and those added by API (in the store).

A change is durable before it is visible; a change that fails leaves nothing behind.
"""

import asyncio
import difflib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from pydantic import ValidationError

from orchestrator.control.ports import Sources, Store
from orchestrator.control.shelf import Applied, Reloaded, Shelf, ceiling_problems, overridden
from orchestrator.errors import Conflict, ModelNotFound, Problem, SpecError, listed
from orchestrator.policy.actions import Learn
from orchestrator.policy.admission import reserve_bytes
from orchestrator.policy.footprint import Footprint, estimate, floor_bytes
from orchestrator.policy.lifecycle import NEVER, Known, Rules, Want
from orchestrator.policy.model import ModelSpec
from orchestrator.policy.placement import allowed, never_fits, wanted_gpus
from orchestrator.policy.snapshot import GpuReading
from orchestrator.policy.stored import Stored

LIMIT_FIELDS = ("kv_floor", "kv_ceiling", "kv_weight", "priority")  # what `limit` may change while an engine runs
LONGEST_NAME = 128  # policy/model.py, NAME
RUNTIME_FIELDS = (*LIMIT_FIELDS, "pinned", "adapters")


class Venv(Protocol):
    """What an engine venv gives all its engines: vLLM arguments, before those of their specs."""

    @property
    def args(self) -> Sequence[str]: ...


class Registry:
    def __init__(
        self,
        store: Store,
        sources: Sources,
        file_specs: Iterable[ModelSpec],
        engines: Iterable[str] | Mapping[str, Venv],
        rules: Rules,
        clock: Callable[[], float] = time.monotonic,
        versions: Callable[[str], str] = lambda engine: "",
    ) -> None:
        """`engines`: by name, or names alone where they give no arguments. `versions`: an engine's name -> what its venv holds: what was
        learned with one version says nothing of the next."""
        self._store, self._sources, self._rules, self._clock = store, sources, rules, clock
        self._file_specs = tuple(file_specs)
        self._versions = versions
        self._engines = frozenset(engines)
        self._args = {name: tuple(venv.args) for name, venv in engines.items()} if isinstance(engines, Mapping) else {}
        self._changing = asyncio.Lock()  # one change at a time: what was checked still holds when the disk has answered
        self._learned: dict[str, Mapping[str, float]] = {}
        self._take(Shelf())

    async def load(self) -> None:
        """What the config files and the store hold. Models marked `preload` count as started now."""
        stored = await self._store.load()
        self._learned = dict(stored.footprints)
        self._take(self._read(self._file_specs, stored))

    async def reload(self, file_specs: Iterable[ModelSpec], gpus: Sequence[GpuReading]) -> Reloaded:
        """The config files hold these now. A model that is as it was keeps all that is known of it. Raises SpecError for a new or changed
        one that can not work here, StoreError; then nothing was changed."""
        async with self._changing:
            file_specs = tuple(file_specs)
            shelf = self._read(file_specs, await self._store.load())
            added, changed = self._difference(shelf)
            self._refuse_faults([name for name in (*added, *changed) if shelf.known[name].owner == "file"], changed, shelf, gpus)
            removed = tuple(name for name in self._known if name not in shelf.known)
            self._file_specs = file_specs
            self._take(shelf)
            return Reloaded(added, changed, removed, len(shelf.known) - len(added) - len(changed))

    async def apply(self, specs: Sequence[ModelSpec], prune: bool, gpus: Sequence[GpuReading], dry_run: bool = False) -> Applied:
        """Those added by API are as these now: what `limit`, `pin` and `adapt` changed of one that differs is over, and only a hold stays.
        `prune`: those that are not named are removed. Raises SpecError with all that is wrong, StoreError; then nothing was changed."""
        async with self._changing:
            stored, given = await self._store.load(), {spec.name: spec for spec in specs}
            mine = {name: model.spec for name, model in self._known.items() if model.owner == "api"}
            put = [spec for name, spec in given.items() if mine.get(name) != spec]
            removed = [name for name in mine if prune and name not in given]
            gone = {*removed, *(spec.name for spec in put)}
            after = replace(
                stored,
                models=(*(spec for spec in stored.models if spec.name not in gone), *put),  # who is untouched keeps its names
                held=stored.held - (given.keys() - mine.keys()),
                overrides={name: fields for name, fields in stored.overrides.items() if name not in gone},
            )
            shelf = self._read(self._file_specs, after)
            self._refuse_clashes(put, shelf)
            added, changed = self._difference(shelf)
            self._refuse_faults((*added, *changed), changed, shelf, gpus)
            told = Applied(
                added=tuple(shelf.known[name].spec for name in added),
                changed=tuple((self._known[name].spec, shelf.known[name].spec) for name in changed),
                removed=tuple(mine[name] for name in removed),
                unchanged=tuple(name for name in given if name not in added and name not in changed),
            )
            if not dry_run and gone:
                await self._store.change_models(put, removed, time.time())
                self._take(self._read(self._file_specs, after))  # anew: much may have been learned and asked for meanwhile
            return told

    def _refuse_clashes(self, put: Sequence[ModelSpec], shelf: Shelf) -> None:
        problems = []
        for spec in put:
            taken = {name: of for name in spec.names if (of := shelf.by_name.get(name, spec.name)) != spec.name}
            known = self._known.get(spec.name)
            if known is not None and known.owner == "file":
                problems.append(Problem(f"models.{spec.name}", "a config file defines it: change it there, then `orchestratorctl reload`"))
            elif taken:
                name, of = next(iter(taken.items()))
                problems.append(Problem(f"models.{spec.name}", f"the name {name!r} is that of the model {of!r}: take another one"))
        if problems:
            raise SpecError(problems)

    def heed(self, rules: Rules) -> None:
        """These hold from now on."""
        self._rules = rules

    def _read(self, file_specs: Sequence[ModelSpec], stored: Stored) -> Shelf:
        shelf = Shelf()
        for owner, specs in (("file", file_specs), ("api", stored.models)):
            for spec in specs:
                if any(name in shelf.by_name for name in spec.names):
                    shelf.overruled.append(spec.name)
                    continue
                shelf.bases[spec.name] = spec
                model = self._model(spec, owner, stored, shelf)
                shelf.known[spec.name] = model
                shelf.by_name.update(dict.fromkeys(model.spec.names, spec.name))
        return shelf

    def _model(self, base: ModelSpec, owner: str, stored: Stored, shelf: Shelf) -> Known:
        """As it is now; what operators did to one that is known stays. Marked `preload` it counts as started when that is first read."""
        held, overrides = base.name in stored.held, stored.overrides.get(base.name, {})
        try:
            spec = overridden(base, overrides)
        except ValidationError:  # the config file has changed under them
            shelf.dropped.append(base.name)
            spec, overrides = base, {}
        before = self._known.get(base.name)
        if before is None:
            started_at = self._clock() if spec.preload and not held else NEVER
            return Known(spec, self._footprint(spec), owner, held, started_at, overrides=overrides)
        if (before.spec, before.owner, before.held, before.overrides) == (spec, owner, held, overrides):
            return before
        started_at = self._clock() if spec.preload and not before.spec.preload and not held else before.started_at
        footprint = self._footprint_after(base.name, spec)
        return replace(before, spec=spec, footprint=footprint, owner=owner, held=held, started_at=started_at, overrides=overrides)

    def _difference(self, shelf: Shelf) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
        """Who would be new, and which fields of whom would change."""
        changed = {name: fields for name in shelf.known if name in self._known and (fields := self._changed(name, shelf))}
        return tuple(name for name in shelf.known if name not in self._known), changed

    def _changed(self, name: str, shelf: Shelf) -> tuple[str, ...]:
        before, after = self._known[name], shelf.known[name]
        fields = [each for each in ModelSpec.model_fields if getattr(before.spec, each) != getattr(after.spec, each)]
        return (*fields, *(["owner"] if before.owner != after.owner else []))

    def _refuse_faults(
        self, names: Iterable[str], changed: Mapping[str, tuple[str, ...]], shelf: Shelf, gpus: Sequence[GpuReading]
    ) -> None:
        """Raises SpecError with all that can not work here."""
        problems = [
            Problem(f"models.{name}.{problem.where}", problem.what)
            for name in names
            if set(changed.get(name, ())) != {"owner"}
            for problem in self._problems(shelf.known[name].spec, shelf.known[name].footprint, gpus)
        ]
        if problems:
            raise SpecError(problems)

    def _take(self, shelf: Shelf) -> None:
        self._known, self._bases, self._by_name = shelf.known, shelf.bases, shelf.by_name
        self.dropped, self.overruled = shelf.dropped, shelf.overruled

    def known(self) -> Mapping[str, Known]:
        return self._known

    def resolve(self, name: str) -> str:
        """The model that a name, an alias or an adapter's name means. Raises ModelNotFound, which lists what there is."""
        model = self._by_name.get(name)
        if model is None and len(name) > LONGEST_NAME:  # to look for the nearest takes a second for 8 MiB
            raise ModelNotFound(f"The model {name[:LONGEST_NAME]!r}… does not exist: no name is that long.", param="model")
        if model is None:
            near = difflib.get_close_matches(name, self._by_name, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            names = listed(self._known, none="none yet; `orchestratorctl add-model NAME SOURCE` adds one")
            raise ModelNotFound(f"The model {name!r} does not exist.{hint} Known models: {names}", param="model")
        return model

    def get(self, name: str) -> Known:
        return self._known[self.resolve(name)]

    async def add(self, spec: ModelSpec, gpus: Sequence[GpuReading], start: bool) -> None:
        """Raises Conflict for a name that is taken, SpecError for a spec that can not work here."""
        async with self._changing:
            self._refuse_taken(spec)
            if problems := self._problems(spec, self._footprint(spec), gpus):
                raise SpecError(problems)
            await self._store.put_model(spec, time.time())
            self._bases[spec.name] = spec
            self._put(Known(spec, self._footprint(spec), "api", started_at=self._clock() if start else NEVER))

    async def remove(self, name: str) -> None:
        async with self._changing:
            model = self.get(name).spec.name
            if self._known[model].owner == "file":
                raise Conflict(
                    f"The model {model!r} is defined in a config file: remove it there, then `orchestratorctl reload`.", param="name"
                )
            await self._store.remove_model(model)
            del self._known[model], self._bases[model]
            self._by_name = {n: m for n, m in self._by_name.items() if m != model}

    async def hold(self, name: str, held: bool) -> None:
        """`stop` holds a model down until `start`: requests do not wake it, and a restart of the daemon does not forget it."""
        async with self._changing:
            name = self.resolve(name)
            await self._store.set_held(name, held)
            model = self._known[name]  # only now: learn() may have put a new footprint there meanwhile
            self._put(replace(model, held=held, started_at=model.started_at if held else self._clock()))

    def want(self, name: str) -> None:
        """As if it were asked for now: started, or woken. Raises Conflict for one that is held down."""
        model = self._free(name)
        self._put(replace(model, started_at=self._clock()))

    def rest(self, name: str, to: Want) -> None:
        """Put away until it is used again: asleep, or unloaded."""
        self._put(replace(self._free(name), rested_at=self._clock(), rest=to))

    def drain(self, name: str) -> None:
        """It finishes what it has and is unloaded; requests that come meanwhile wait, and bring it back then."""
        now = self._clock()
        self._put(replace(self._free(name), drained_at=now, rested_at=now, rest=Want.NOTHING))

    def _free(self, name: str) -> Known:
        model = self.get(name)
        if model.held:
            real = model.spec.name
            raise Conflict(f"The model {real!r} was stopped by an operator: `orchestratorctl start {real}` first.", param="name")
        return model

    async def limit(self, name: str, changes: Mapping[str, object], gpus: Sequence[GpuReading]) -> None:
        """Change a model's bounds while it runs, and for later runs. `changes`: field -> value as in a spec; None gives the field
        back to the spec. Raises SpecError, with nothing changed."""
        async with self._changing:
            name = self.resolve(name)
            if unknown := sorted(changes.keys() - set(RUNTIME_FIELDS)):
                raise SpecError(
                    [Problem(field, f"can not be changed while it runs; these can: {', '.join(LIMIT_FIELDS)}") for field in unknown]
                )
            overrides = {k: v for k, v in {**self._known[name].overrides, **changes}.items() if v is not None}
            spec = overridden(self._bases[name], overrides)
            self._refuse_taken(spec, but=name)
            footprint = self._footprint_after(name, spec)
            if problems := ceiling_problems(spec, footprint) or self._size_problems("kv_floor", spec, footprint, gpus):
                raise SpecError(problems)
            await self._store.set_overrides(name, overrides)
            footprint = self._footprint_after(name, spec)  # with what was learned meanwhile
            self._put(replace(self._known[name], spec=spec, footprint=footprint, overrides=overrides))

    async def pin(self, name: str, pinned: bool, gpus: Sequence[GpuReading]) -> None:
        """Also for later runs; nothing is kept where its spec says the same."""
        base = self._bases[self.resolve(name)]
        await self.limit(name, {"pinned": None if base.pinned == pinned else pinned}, gpus)

    async def adapt(self, name: str, changes: Mapping[str, str | None], gpus: Sequence[GpuReading]) -> None:
        """LoRA adapters by name: a source adds or replaces one, None removes it. Also for later runs. Raises ModelNotFound for one that is
        not there to be removed, Conflict, SpecError, with nothing changed."""
        known = self._known[self.resolve(name)]
        adapters = dict(known.spec.adapters)
        for adapter, source in changes.items():
            if source is not None:
                adapters[adapter] = source
            elif adapters.pop(adapter, None) is None:
                raise ModelNotFound(
                    f"{known.spec.name!r} has no adapter {adapter!r}; it has: {', '.join(adapters) or 'none'}.", param="name"
                )
        try:
            spec = known.spec.model_copy(update={"adapters": adapters})
            ModelSpec.model_validate(spec.model_dump())
        except ValidationError as error:
            raise SpecError([Problem("adapters", str(each["msg"]).removeprefix("Value error, ")) for each in error.errors()]) from None
        if problem := self._sources.problem(spec):
            raise SpecError([Problem("adapters", problem)])
        base = self._bases[known.spec.name]
        await self.limit(known.spec.name, {"adapters": None if dict(base.adapters) == adapters else adapters}, gpus)

    async def learn(self, learned: Learn) -> None:
        """Keep what an engine has shown, for every model that would be started alike."""
        model = self._known.get(learned.model)
        key = self._key(learned.footprint_key, model.spec.engine if model else "default")
        figures = self._learned[key] = {**self._learned.get(key, {}), **learned.figures}
        for model in list(self._known.values()):
            if model.spec.footprint_key() == learned.footprint_key:
                self._put(replace(model, footprint=self._footprint(model.spec)))
        await self._store.put_footprint(key, figures)

    def _key(self, footprint_key: str, engine: str) -> str:
        return " ".join(part for part in (footprint_key, self._versions(engine), *self._args.get(engine, ())) if part)

    def source_problems(self) -> list[Problem]:
        """Registered models whose source is not there now: worth a warning at start, not a refusal (a disk may be mounted later)."""
        found = ((model.spec.name, self._sources.problem(model.spec)) for model in self._known.values())
        return [Problem(f"models.{name}.source", problem) for name, problem in found if problem]

    def _put(self, model: Known) -> None:
        before = self._known.get(model.spec.name)
        if before is not None and before.spec.names != model.spec.names:
            self._by_name = {name: of for name, of in self._by_name.items() if of != model.spec.name}
        self._known[model.spec.name] = model
        for name in model.spec.names:
            self._by_name[name] = model.spec.name

    def _footprint(self, spec: ModelSpec) -> Footprint:
        args = (*self._args.get(spec.engine, ()), *spec.args)  # as it is started: its own come later, and so win
        estimated = estimate(spec.model_copy(update={"args": args}), self._sources.shape(spec))
        return estimated.learned(self._learned.get(self._key(spec.footprint_key(), spec.engine), {}))

    def _footprint_after(self, name: str, spec: ModelSpec) -> Footprint:
        """When `name` has this spec. Its folder is read again only where that may say something else."""
        known = self._known[name]
        return known.footprint if spec.footprint_key() == known.spec.footprint_key() else self._footprint(spec)

    def _refuse_taken(self, spec: ModelSpec, but: str | None = None) -> None:
        """`but`: the model that has this spec."""
        for name in spec.names:
            model = self._by_name.get(name)
            if model is not None and model != but:
                owner = "in a config file" if self._known[model].owner == "file" else "already"
                of = "adapter" if name in self._known[model].spec.adapters else "alias"
                what = "is a model" if model == name else f"is an {of} of {model!r}"
                raise Conflict(
                    f"The name {name!r} {what} that is registered {owner}: take another name, or `orchestratorctl rm {model}` first.",
                    param="name",
                )

    def _problems(self, spec: ModelSpec, footprint: Footprint, gpus: Sequence[GpuReading]) -> list[Problem]:
        problems = []
        if spec.engine not in self._engines:
            problems.append(Problem("engine", f"there is no engine {spec.engine!r}; known: {', '.join(sorted(self._engines))}"))
        if problem := self._sources.problem(spec):
            problems.append(Problem("source", problem))
        by_uuid = {gpu.uuid: gpu for gpu in gpus}
        usable, unknown = allowed(spec, by_uuid)
        here = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in gpus)
        for name in unknown:
            problems.append(Problem("gpus", f"no GPU here is {name!r}; there are: {here}"))
        if len(usable) < spec.tensor_parallel_size and not unknown:
            problems.append(Problem("tensor_parallel_size", f"{wanted_gpus(spec)}, {len(usable)} here: {here or 'none'}"))
        if problems:
            return problems
        return ceiling_problems(spec, footprint) + self._size_problems("source", spec, footprint, gpus)

    def _size_problems(self, field: str, spec: ModelSpec, footprint: Footprint, gpus: Sequence[GpuReading]) -> list[Problem]:
        """That not even empty cards could hold it, with the arithmetic."""
        by_uuid = {gpu.uuid: gpu for gpu in gpus}
        usable, _ = allowed(spec, by_uuid)
        if not footprint.known or not usable:
            return []
        reserve = {gpu.uuid: reserve_bytes(gpu, self._rules) for gpu in gpus}
        parts = footprint.parts if footprint.source == "estimated" else {"learned": footprint.start_bytes}
        why = never_fits(spec, parts, floor_bytes(spec, footprint), reserve, [by_uuid[uuid] for uuid in usable])
        return [Problem(field, f"can never fit: {why}")] if why else []
