"""Which tokens a sequence has, and how often each was said: what penalties look at. No torch here.

Counted once per token instead of once per token and step, in arrays that numpy reads as they are.
"""

from array import array
from collections.abc import Sequence


class Occurrences:
    """Distinct tokens of a prompt and of what was said behind it so far."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        self._place = {token_id: place for place, token_id in enumerate(dict.fromkeys(prompt_token_ids))}
        self.token_ids = array("q", self._place)
        self.num_said = array("q", bytes(self.token_ids.itemsize * len(self._place)))
        """How often each of `token_ids` was said; 0 of those that stand in the prompt alone."""
        self.num_told = 0
        """Said tokens that it knows."""

    def tell(self, token_ids: Sequence[int]) -> None:
        """Count the next tokens that were said."""
        for token_id in token_ids:
            place = self._place.setdefault(token_id, len(self.token_ids))
            if place == len(self.token_ids):
                self.token_ids.append(token_id)
                self.num_said.append(0)
            self.num_said[place] += 1
        self.num_told += len(token_ids)
