"""Energy of a token under a plan, from power that was measured.

    J per token = W of the phase, mean over the time of the steps x devices / tokens per second

Steps with prompts draw the power of prefill, and all devices are taken to be busy. Shapes: (3,): low, likely,
high.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from observatory.analysis.capacity.power import PhasePower, nearest_power
from observatory.analysis.capacity.rates import GRADES, Grade

if TYPE_CHECKING:
    from observatory.advice.capacity.plan import Candidate

Float64 = NDArray[np.float64]

#: A grade that less than this part of the time rests on does not count.
_SMALL = 0.1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenEnergy:
    """Energy of a generated token.

    Attributes:
        joules_3: low, likely, high.
        grade: the worst of its power and of a tenth of its time; power of another batch, or of a simulated
            device, is assumed.
        is_simulated: some of the power was played from a recording.
    """

    joules_3: Float64
    grade: Grade
    is_simulated: bool


def token_energy(one: Candidate, measured: Sequence[PhasePower]) -> TokenEnergy | None:
    """Energy of a token of a set-up; None where the power of one of its phases was not measured."""
    apart = one.prefill_parallel
    prompts = apart or one.parallel
    decode_tokens, prefill_tokens = one.sequences / one.parallel.tp, one.prefill_chunk / prompts.tp
    decode = nearest_power(measured, "decode", ranks=one.parallel.ranks, tokens=decode_tokens)
    prefill = nearest_power(measured, "prefill", ranks=prompts.ranks, tokens=prefill_tokens)
    if decode is None or prefill is None:
        return None
    with_prompts_3 = one.prompt_part * one.prefill.s_3
    without_3 = (1.0 - one.prompt_part) * one.decode.s_3
    share_3 = with_prompts_3 / (with_prompts_3 + without_3)
    # A lock lengthens steps that only decode, and lowers their power; both are in the time of a token.
    decode_3 = decode.watts_3 * one.locked_power
    watts_3 = share_3 * prefill.watts_3 + (1.0 - share_3) * decode_3
    # Slow steps take as much longer for the same tokens.
    watts_3 = watts_3 * one.instances * one.parallel.ranks * one.ms_per_token_3 / one.ms_per_token_3[1]
    if apart is not None:
        slower_3 = one.prefill.s_3 / one.prefill.s_3[1]
        watts_3 = watts_3 + prefill.watts_3 * one.prefill_instances * apart.ranks * slower_3
    joules_3 = watts_3 / float(one.tokens_per_s_3[1])
    both = (decode, prefill)
    is_simulated = any(power.is_simulated for power in both)
    is_near = decode.is_near(decode_tokens) and prefill.is_near(prefill_tokens)
    of_time: list[Grade] = [grade for grade in GRADES if one.graded[grade] >= _SMALL]
    grades: list[Grade] = [*of_time, "measured" if is_near and not is_simulated else "assumed"]
    return TokenEnergy(
        joules_3=np.asarray(joules_3), grade=max(grades, key=GRADES.index), is_simulated=is_simulated
    )
