"""Who holds which expert, and what one rank sends to whom.

Shapes: E experts, Z slots (an expert held by r ranks fills r slots), P ranks, G ranks of a group, T tokens,
K assignments per token, N rows sent, M slots named in a row.

Slots are numbered rank by rank, and within a rank by expert: the slot determines the rank, and on it the
local expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from observatory.collectives.layout import Layout
from observatory.errors import PlacementError

#: Slot of an assignment that goes nowhere: padding, a skipped token.
NO_SLOT = -1
#: Multiples of it are spread evenly over 0 to 1.
_GOLDEN = (5**0.5 - 1) / 2


class ExpertMap:
    """The slots of one layer, as seen from one rank.

    Where an expert has several holders, a token goes to the own rank if that is one of them; else to one on
    the own node; else to any. Among several equals they take turns: the token at position t of rank r goes to
    number (t + r) modulo their number. The choice needs no communication and is the same in every run.

    Where shares are given, a token for an expert of several holders goes to one of all of them, near or not,
    so that each gets its share: position plus rank, times the golden ratio, is spread evenly over 0 to 1.

    Attributes:
        experts: E.
        holders_E: ranks that hold each expert, ascending.
        rank_of_Z: rank of each slot, ascending.
        first_slot_P: first slot of each rank, with the number of slots at the end, (P + 1,).
        experts_here: experts that this rank holds, ascending.
    """

    def __init__(
        self,
        holders_E: Sequence[Sequence[int]],
        layout: Layout,
        shares_E: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Number the slots.

        Args:
            holders_E: ranks that hold each expert.
            layout: the ranks and their nodes.
            shares_E: share of its expert's tokens for each of these ranks; None: the nearest, by turns.

        Raises:
            PlacementError: an expert without a rank, twice on one, or on a rank that does not exist.
        """
        for expert, holders in enumerate(holders_E):
            if not holders or len(set(holders)) < len(holders):
                raise PlacementError(
                    f"expert {expert} is placed on ranks {list(holders)}; expected at least one, each once"
                )
            if min(holders) < 0 or max(holders) >= layout.size:
                raise PlacementError(
                    f"expert {expert} is placed on ranks {list(holders)}; there are ranks 0 to "
                    f"{layout.size - 1}"
                )
        self.experts = len(holders_E)
        self.holders_E = tuple(tuple(sorted(holders)) for holders in holders_E)
        held_P = [
            [e for e, holders in enumerate(self.holders_E) if rank in holders] for rank in range(layout.size)
        ]
        self.experts_here = tuple(held_P[layout.rank])
        counts = torch.tensor([len(held) for held in held_P])
        self.rank_of_Z = torch.repeat_interleave(torch.arange(layout.size), counts)
        self.first_slot_P = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        slot_of = {
            (rank, expert): int(self.first_slot_P[rank]) + index
            for rank, held in enumerate(held_P)
            for index, expert in enumerate(held)
        }
        near = [
            [slot_of[rank, expert] for rank in _nearest(holders, layout)]
            for expert, holders in enumerate(self.holders_E)
        ]
        self._turn = layout.rank
        self._upto_EC: torch.Tensor | None = None
        if shares_E is not None:
            near = [[slot_of[rank, expert] for rank in holders] for expert, holders in enumerate(holders_E)]
            self._upto_EC = torch.ones((self.experts, max(map(len, near))), dtype=torch.float64)
            for upto_C, shares in zip(self._upto_EC, shares_E, strict=True):
                upto_C[: len(shares) - 1] = torch.tensor(shares[:-1], dtype=torch.float64).cumsum(0)
        self._choices_E = torch.tensor([len(slots) for slots in near])
        most = max(len(slots) for slots in near)
        self._slots_EC = torch.tensor([slots + [NO_SLOT] * (most - len(slots)) for slots in near])

    @property
    def replicated(self) -> bool:
        """Whether any expert has several holders."""
        return any(len(holders) > 1 for holders in self.holders_E)

    def slots(self, expert_ids_TK: torch.Tensor) -> torch.Tensor:
        """Slot of each assignment, int64 (T, K); ``NO_SLOT`` for ids outside 0..E-1."""
        device = expert_ids_TK.device
        inside = (expert_ids_TK >= 0) & (expert_ids_TK < self.experts)
        ids = torch.where(inside, expert_ids_TK, 0).long()
        choices, slots_EC = self._choices_E.to(device), self._slots_EC.to(device)
        position_T1 = torch.arange(ids.shape[0], device=device).unsqueeze(1) + self._turn
        if self._upto_EC is None:
            place_TK = position_T1 % choices[ids]
        else:
            even_T11 = (position_T1.double() * _GOLDEN % 1.0).unsqueeze(2)
            place_TK = (even_T11 >= self._upto_EC.to(device)[ids]).sum(dim=2).clamp_max(choices[ids] - 1)
        chosen = slots_EC[ids, place_TK]
        return torch.where(inside, chosen, NO_SLOT)


def _nearest(holders: Sequence[int], layout: Layout) -> list[int]:
    """The holders to choose from: this rank, else those of its node, else all."""
    if layout.rank in holders:
        return [layout.rank]
    node = layout.node_of_P[layout.rank]
    return [rank for rank in holders if layout.node_of_P[rank] == node] or list(holders)


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchPlan:
    """What one rank sends in one step of an exchange, sorted by destination.

    Attributes:
        source_N: row of the input that each sent row is a copy of.
        assignment_NM: assignment (column of the input's slots) in each place of the row; -1 for none.
        slots_NM: slot of each place; ``NO_SLOT`` for none.
        send_G: rows to each member of the group.
    """

    source_N: torch.Tensor
    assignment_NM: torch.Tensor
    slots_NM: torch.Tensor
    send_G: tuple[int, ...]

    @classmethod
    def make(
        cls, slots_TK: torch.Tensor, member_of_Z: torch.Tensor, members: int, *, deduplicate: bool
    ) -> DispatchPlan:
        """Plan the rows.

        Args:
            slots_TK: slot of each assignment, ``NO_SLOT`` for none.
            member_of_Z: member of the group that leads to each slot.
            members: G.
            deduplicate: one row per token and member, naming all slots there, instead of one per assignment.
        """
        tokens, top_k = slots_TK.shape
        valid_TK = slots_TK != NO_SLOT
        member_TK = torch.where(valid_TK, member_of_Z.to(slots_TK.device)[slots_TK.clamp_min(0)], members)
        if not deduplicate:
            flat_A = slots_TK.reshape(-1)
            # Within a member by slot, so that the rows of one expert arrive together.
            key_A = torch.where(
                flat_A == NO_SLOT, members * len(member_of_Z), member_TK.reshape(-1) * len(member_of_Z)
            ) + flat_A.clamp_min(0)
            order_N = torch.argsort(key_A, stable=True)[: int(valid_TK.sum())]
            send_G = torch.bincount(member_TK.reshape(-1), minlength=members + 1)[:members]
            return cls(
                source_N=order_N // top_k if top_k else order_N,
                assignment_NM=(order_N % top_k if top_k else order_N).unsqueeze(1),
                slots_NM=flat_A[order_N].unsqueeze(1),
                send_G=tuple(send_G.tolist()),
            )
        wanted_TG = torch.zeros((tokens, members + 1), dtype=torch.bool, device=slots_TK.device)
        wanted_TG.scatter_(1, member_TK, value=True)
        wanted_GT = wanted_TG[:, :members].T
        member_N, source_N = wanted_GT.nonzero(as_tuple=True)
        here_NK = member_TK[source_N] == member_N.unsqueeze(1)
        columns_K = torch.arange(top_k, device=slots_TK.device).expand(len(source_N), top_k)
        return cls(
            source_N=source_N,
            assignment_NM=torch.where(here_NK, columns_K, -1),
            slots_NM=torch.where(here_NK, slots_TK[source_N], NO_SLOT),
            send_G=tuple(wanted_GT.sum(dim=1).tolist()),
        )

    def weights(self, weights_TK: torch.Tensor) -> torch.Tensor:
        """Gate weight in each place of each row, (N, M); zero where there is none."""
        places_NM = self.assignment_NM.clamp_min(0)
        return weights_TK[self.source_N.unsqueeze(1), places_NM] * (self.assignment_NM >= 0)
