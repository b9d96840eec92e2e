"""The flow that a Prefect deployment starts: the form in the UI takes the same overrides as the command line."""

from prefect import flow

from .pipeline import pipeline
from .run import compose_config


@flow(name="wsiflow run", persist_result=False)
def run(overrides: list[str]) -> dict[str, float]:
    """Run the whole line.

    Args:
        overrides: What would stand behind ``wsiflow run``, such as ``["dataset=folder", "dataset.folder=/slides"]``.

    Returns:
        Every number of ``summary.json``.

    Raises:
        InputError: An override is unknown or out of bounds.
        SlidesFailedError: Slides have no result; the message lists them.
    """
    return pipeline(compose_config(overrides)).metrics
