"""Whether drafts pay: steps with a draft against plain ones, in tokens and seconds, measured on the texts themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

#: Steps with a draft, and plain ones, that a verdict rests on.
TRIAL_STEPS, PLAIN_STEPS = 32, 6
#: Steps with a draft before the first plain ones.
FIRST_DRAFTS = 4
#: Plain steps before drafts are tried again after they did not pay; doubled each time.
PAUSE_STEPS = 256


@dataclass
class Payoff:
    """Chooses between steps with a draft and plain ones, and counts what they made.

    A trial compares tokens a second of both kinds, with the medians of their times. While drafts pay, each further
    ``TRIAL_STEPS`` of them are judged again, so that they are switched off where texts no longer repeat themselves.

    :ivar adaptive: without it drafts are never switched off.
    :ivar passes: forward passes after the prompts'. :ivar plain_passes: those that one token a pass would have taken.
    :ivar accepted: drafted tokens that were kept, over all rows. :ivar drafted: tokens that were proposed, over all rows.
    """

    adaptive: bool = True
    passes: int = 0
    plain_passes: int = 0
    accepted: int = 0
    drafted: int = 0
    switched_off: int = 0
    reason: str = ""
    pause: int = 0
    next_pause: int = PAUSE_STEPS
    draft_steps: list[tuple[float, float]] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)

    def wants_draft(self) -> bool:
        """Whether the next step should verify a draft."""
        if self.pause:
            return False
        return not self.adaptive or len(self.plain_seconds) >= PLAIN_STEPS or len(self.draft_steps) < FIRST_DRAFTS

    def plain(self, seconds: float, steps: int = 1) -> None:
        """Plain steps were made, each in so many seconds."""
        self.passes += steps
        self.pause = max(0, self.pause - steps)
        self.plain_seconds = [*self.plain_seconds, *[seconds] * steps][-PLAIN_STEPS - 1 :]

    def draft(self, tokens: float, seconds: float, steps: int = 1) -> None:
        """Steps with a draft were made, each of ``tokens`` a row that was not at its end."""
        self.passes += steps
        self.draft_steps += [(tokens, seconds)] * steps
        if self.adaptive and len(self.draft_steps) >= TRIAL_STEPS and len(self.plain_seconds) >= PLAIN_STEPS:
            self._judge()

    def _judge(self) -> None:
        made = sum(tokens for tokens, _ in self.draft_steps) / len(self.draft_steps)
        cost = median(seconds for _, seconds in self.draft_steps) / median(self.plain_seconds)
        self.draft_steps.clear()
        if made > cost:
            self.next_pause = PAUSE_STEPS
            return
        self.switched_off += 1
        self.reason = f"{made:.2f} tokens a step that costs {cost:.2f} plain ones"
        self.pause, self.next_pause = self.next_pause, 2 * self.next_pause
