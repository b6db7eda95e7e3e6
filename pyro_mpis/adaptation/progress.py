# SPDX-License-Identifier: Apache-2.0
"""The progress bar of a fit: what is being done, the ELBO or log evidence, the smallest ESS."""

from types import TracebackType

from torch import Tensor
from tqdm.auto import tqdm

DELAY = 3.0  # seconds, before which nothing is shown


class Progress:
    """
    A bar that appears when a fit takes longer than some seconds.

    :param show: whether to show it at all; even then only in a terminal or a notebook.
    """

    def __init__(self, show: bool) -> None:
        self._bar = tqdm(
            desc="adapting",
            disable=None if show else True,  # None: where the output is no terminal
            leave=False,
            delay=DELAY,
            bar_format="{desc}: {n_fmt} steps [{elapsed}]{postfix}",
        )

    def __enter__(self) -> "Progress":
        """Return this object."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the bar."""
        self._bar.close()

    def fitting(self, elbo: float) -> None:
        """Count a step of a fit."""
        self._bar.set_description_str("fitting", refresh=False)
        self._bar.set_postfix_str(f"ELBO {elbo:.2f}", refresh=False)
        self._bar.update()

    def trying(self, what: str, log_evidence: float, ess: Tensor) -> None:
        """Count trial runs."""
        self._bar.set_description_str(what, refresh=False)
        smallest = float(ess.min())
        self._bar.set_postfix_str(
            f"log evidence {log_evidence:.2f}, smallest ESS {smallest:.1f}", refresh=False
        )
        self._bar.update()
