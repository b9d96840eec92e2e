"""What the outputs of a network mean: how they become the probabilities of the classes, and the score of a window.

Input: the outputs of a network, float32 (n, outputs, ...); further axes are places of a map. Output: probabilities,
float32 (n, classes, ...), or scores, float32 (n, ...). Both are computed in fp32 at any precision of the network, since
bfloat16 probabilities near 1 are multiples of 1/256. Where a run maps further classes, their probabilities stand behind
the score along one more axis, the last: float32 (n, ..., 1 + maps).
"""

from typing import NamedTuple

import torch

from wsiflow.model.card import OutputKind


class Outputs(NamedTuple):
    """The meaning of a network's outputs.

    Attributes:
        kind: ``logits``: the probabilities are their softmax; ``sigmoid``: logits of classes that do not exclude each
            other, or of the second of two classes; ``probabilities``: the network ends with either itself.
        n_classes: Number of classes.
        positive: Indices of the classes whose probabilities are summed to the score of a window.
        maps: Indices of the further classes that are mapped beside the score, ascending.
    """

    kind: OutputKind
    n_classes: int
    positive: tuple[int, ...]
    maps: tuple[int, ...] = ()

    def fits(self, n_outputs: int) -> bool:
        """Return whether a network may have a number of outputs: one per class, or a single one for the second of two.

        Args:
            n_outputs: Number of outputs of the network.
        """
        return n_outputs == self.n_classes or (n_outputs == 1 and self.n_classes == 2 and self.kind != "logits")

    def probabilities(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the probability of every class, float32 (n, classes, ...)."""
        return self._of_classes(self._independent(outputs))

    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the score of every window, float32 (n, ...), or with further classes float32 (n, ..., 1 + maps)."""
        each = self._independent(outputs)
        score = self._score(each)
        if not self.maps:
            return score
        further = self._of_classes(each)[:, list(self.maps)]
        return torch.cat([score.unsqueeze(1), further], dim=1).movedim(1, -1)

    def _score(self, each: torch.Tensor) -> torch.Tensor:
        """Return the score from a probability for each output, float32 (n, ...)."""
        if each.shape[1] != self.n_classes:  # the probability of the second class alone
            return each[:, 0] if self.positive == (1,) else self._of_classes(each)[:, list(self.positive)].sum(1)
        if len(self.positive) == 1:
            return each[:, self.positive[0]]
        return each[:, list(self.positive)].sum(dim=1)

    def _of_classes(self, each: torch.Tensor) -> torch.Tensor:
        """Return the probability of every class, float32 (n, classes, ...), from one for each output."""
        return each if each.shape[1] == self.n_classes else torch.cat([1 - each, each], dim=1)

    def _independent(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return a probability for each output."""
        if self.kind == "logits":
            return torch.softmax(outputs.float(), dim=1)
        return torch.sigmoid(outputs.float()) if self.kind == "sigmoid" else outputs.float()
