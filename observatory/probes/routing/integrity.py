"""Whether a watched model is still what it was at the start: hooks and modules, looked at between steps.

Other libraries clear hooks, replace layers, wrap and quantise modules in place. What is looked at is cheap:
one look-up for each hook, and one comparison of the children of each module around the watched ones. What has
changed is watched again, and stated as a loss: calls since the last look may be missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from observatory.errors import ModelError
from observatory.probes.routing.attachment import Attachment
from observatory.probes.routing.sites import RoutingSite, may_drop_inside


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Something because of which calls may be missing.

    Attributes:
        code: a code of ``observatory.run.gaps``.
        site: index of the site; None for the model, or for a layer that is not watched.
        module: name of a layer that is not watched.
    """

    code: str
    site: int | None = None
    module: str | None = None


class HookKeeper:
    """The hooks on one model, by site.

    Attributes:
        sites: the sites as they are now; a layer that was replaced by one of its kind keeps index and record.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[RoutingSite],
        *,
        attach: Callable[[int, RoutingSite], list[Attachment]],
        attach_to_model: Callable[[], Iterable[Attachment]],
        find: Callable[[], Sequence[RoutingSite]],
    ) -> None:
        """Keep the hooks of ``model``.

        Args:
            model: the model.
            sites: its sites.
            attach: puts the hooks of a site on, those by which it is counted first.
            attach_to_model: puts the hooks on that show the phase.
            find: finds the sites again.
        """
        self.sites = list(sites)
        self._model = model
        self._attach = attach
        self._attach_to_model = attach_to_model
        self._find = find
        self._of_model: list[Attachment] = []
        self._of_site: dict[int, list[Attachment]] = {}
        self._astray: dict[int, str] = {}
        self._refused: set[int] = set()
        self._numbers = [site.spec.layer for site in sites]
        self._was_copied = False
        self._is_paused = False
        self._added: tuple[str, ...] = ()
        self._parents: list[tuple[nn.Module, dict[str, nn.Module | None]]] = []
        self._hooks: list[tuple[nn.Module, int]] = []
        self._pre_hooks: list[tuple[nn.Module, int]] = []

    def attach(self) -> None:
        """Put the hooks on; all of them or, when one cannot be put on, none."""
        try:
            for attachment in self._attach_to_model():
                self._of_model.append(attachment)
            for index, site in enumerate(self.sites):
                self._of_site[index] = self._attach(index, site)
        except BaseException:
            self.detach()
            raise
        self._remember()

    def detach(self) -> None:
        """Take all hooks off; doing it twice does nothing."""
        self.was_copied()
        self._parents, self._hooks, self._pre_hooks = [], [], []
        for attachments in (*self._of_site.values(), self._of_model):
            while attachments:
                attachments.pop().remove()

    def pause(self) -> None:
        """Take all hooks off until `resume`."""
        self.was_copied()
        self._is_paused = True
        for attachment in self._all():
            attachment.pause()

    def resume(self) -> None:
        """Put the hooks on again; what has changed meanwhile is no loss."""
        for attachment in self._all():
            attachment.resume()
        self._is_paused = False
        self._remember_hooks()
        self.look()

    def was_copied(self) -> bool:
        """Whether watched modules were copied or pickled: copies have no hooks. Final after ``detach``."""
        self._was_copied = self._was_copied or any(a.was_copied() for a in self._all() if not a.is_minor)
        return self._was_copied

    def look(self, *, at_all: bool = False) -> list[Loss]:
        """What has changed since the last time; hooks are put on again. Nothing while they are off.

        Args:
            at_all: also at hooks on single experts, of which there may be thousands.
        """
        losses = list[Loss]()
        if self._is_paused:
            return losses
        if any(parent._modules != children for parent, children in self._parents):
            losses += self._look_again()
            self._remember()
        is_whole = all(number in module._forward_hooks for module, number in self._hooks) and all(
            number in module._forward_pre_hooks for module, number in self._pre_hooks
        )
        if at_all or not is_whole:
            losses += self._restore()
            self._remember()
        losses += [Loss(code=code, site=index) for index, code in self._astray.items()]
        losses += [Loss(code="hooks_refused", site=index) for index in sorted(self._refused)]
        losses += [Loss(code="added", module=name) for name in self._added]
        return losses

    def _look_again(self) -> list[Loss]:
        try:
            sites_now = list(self._find())
        except ModelError:
            sites_now = []
        now, left = _match(self.sites, sites_now)
        reachable = {id(module) for module in self._model.modules()}
        losses = list[Loss]()
        self._astray = {}
        for index, old in enumerate(self.sites):
            new = now.get(index)
            if new is None:
                if id(old.module) not in reachable:
                    taken = [other for other in left if _is_in_place_of(old, other)]
                    left = [other for other in left if other not in taken]
                    self._astray[index] = "replaced_by_unknown" if taken or not sites_now else "removed"
                continue
            if new.module is old.module and new.spec.layer != self._numbers[index]:
                losses.append(Loss(code="moved", site=index))
            self._numbers[index] = new.spec.layer
            if new.module is old.module and new.block is old.block and new.experts == old.experts:
                continue
            hooks = next(iter(self._of_site[index]), None)
            if new.module is not old.module and not (hooks and hooks.is_carried_by(new.module)):
                losses.append(Loss(code="replaced", site=index))
            elif new.module is old.module and hooks and not hooks.is_on():
                losses.append(Loss(code="hooks_removed", site=index))
            elif _needs_checks(old) and any(id(expert) not in reachable for expert in old.experts):
                losses.append(Loss(code="replaced", site=index))
            while self._of_site[index]:
                self._of_site[index].pop().remove()
            self.sites[index] = replace(new, spec=old.spec)
            self._refused.discard(index)
            try:
                self._of_site[index] = self._attach(index, self.sites[index])
            except Exception:  # whatever a foreign module does: the model's own run must not suffer from it
                self._refused.add(index)
        self._added = tuple(site.spec.module for site in left)
        return losses

    def _restore(self) -> list[Loss]:
        losses = list[Loss]()
        if not all(attachment.is_on() for attachment in self._of_model):
            losses.append(Loss(code="model_hooks_removed"))
            with contextlib.suppress(Exception):  # the phase stays unknown, and is stated to be
                for attachment in self._of_model:
                    attachment.restore()
        for index, attachments in self._of_site.items():
            if all(attachment.is_on() for attachment in attachments):
                continue
            is_counted = attachments[0].is_on() and not _needs_checks(self.sites[index])
            losses.append(Loss(code="checks_removed" if is_counted else "hooks_removed", site=index))
            try:
                for attachment in attachments:  # all, in their order
                    attachment.restore()
            except Exception:  # as above
                self._refused.add(index)
                while attachments:
                    attachments.pop().remove()
        return losses

    def _all(self) -> list[Attachment]:
        return [a for group in (self._of_model, *self._of_site.values()) for a in group]

    def _remember(self) -> None:
        self._remember_hooks()
        self._parents = [
            (parent, dict(parent._modules))
            for parent in _around(self._model, [a.module for a in self._all()])
        ]

    def _remember_hooks(self) -> None:
        attachments = self._all()
        self._hooks = [entry for a in attachments if not a.is_minor for entry in a.hooks()]
        self._pre_hooks = [entry for a in attachments if not a.is_minor for entry in a.pre_hooks()]


def _needs_checks(site: RoutingSite) -> bool:
    """Whether each call is held against its experts, and counted when its block ends."""
    return site.infers or may_drop_inside(site)


def _around(model: nn.Module, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules on all ways from a model to some of its modules, those left out."""
    parents: dict[int, list[nn.Module]] = {}
    for parent in model.modules():
        for child in parent._modules.values():
            if child is not None:
                parents.setdefault(id(child), []).append(parent)
    around: dict[int, nn.Module] = {}
    waiting = list(modules)
    while waiting:
        for parent in parents.get(id(waiting.pop()), ()):
            if id(parent) not in around:
                around[id(parent)] = parent
                waiting.append(parent)
    return list(around.values())


def _match(
    watched: Sequence[RoutingSite], sites_now: Sequence[RoutingSite]
) -> tuple[dict[int, RoutingSite], list[RoutingSite]]:
    """The site that each index has now, and the sites that are of no index.

    It is that of the same module, else one of the same name, else one of the same layer number, with as many
    experts and as many per token.
    """
    open_, left, now = dict(enumerate(watched)), list(sites_now), dict[int, RoutingSite]()
    for is_same in (_has_module, _has_name, _has_number):
        for index, site in list(open_.items()):
            new = next((new for new in left if is_same(site, new)), None)
            if new is not None:
                now[index] = new
                left = [other for other in left if other is not new]
                del open_[index]
    return now, left


def _has_module(old: RoutingSite, new: RoutingSite) -> bool:
    return new.module is old.module


def _has_name(old: RoutingSite, new: RoutingSite) -> bool:
    return new.spec.module == old.spec.module and _fits(old, new)


def _has_number(old: RoutingSite, new: RoutingSite) -> bool:
    return new.spec.layer == old.spec.layer and _fits(old, new)


def _fits(old: RoutingSite, new: RoutingSite) -> bool:
    return new.spec.experts == old.spec.experts and new.spec.top_k == old.spec.top_k


def _is_in_place_of(old: RoutingSite, new: RoutingSite) -> bool:
    return new.spec.module == old.spec.module or new.spec.layer == old.spec.layer
