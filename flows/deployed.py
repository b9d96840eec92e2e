"""The flow that a Prefect deployment starts: the form in the UI takes the same overrides as the command line."""

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from prefect import flow

from wsiflow.errors import InputError, WsiflowError

from .pipeline import pipeline
from .run import to_config


@flow(name="wsiflow run", persist_result=False)
def run(overrides: list[str]) -> dict[str, float]:
    """Run the whole line.

    Args:
        overrides: What would stand behind ``wsiflow run``, such as ``["dataset=folder", "dataset.folder=/slides"]``.

    Returns:
        Every number of ``summary.json``.

    Raises:
        InputError: An override is unknown or out of bounds.
        WsiflowError: Slides failed; the message lists them.
    """
    try:
        with initialize_config_module("wsiflow.conf", version_base="1.3"):
            composed = compose("config", overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(str(error), "wsiflow run --cfg job shows every key", stage="configuration") from error
    summary = pipeline(to_config(composed, sweep=False))
    if summary.exit_code not in (0, 10):
        raise WsiflowError(summary.text, "mend what it names and run again")
    return summary.metrics
