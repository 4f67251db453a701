"""A pytest plugin: of all tests only every so manieth, so that several machines share them.

`ITM_SHARE` is `NUMBER/MACHINES`. Neighbours, which take about as long, go to different ones.
What fails is told at once, too: a machine that is stopped never comes to its summary.
"""

import os

import pytest


@pytest.hookimpl(trylast=True)  # what was asked for by -k is known then
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, machines = map(int, os.environ["ITM_SHARE"].split("/"))
    others = [item for n, item in enumerate(items) if n % machines != number]
    items[:] = items[number::machines]
    config.hook.pytest_deselected(items=others)


@pytest.hookimpl(trylast=True)  # behind the line that names the test
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\n{report.when} of {report.nodeid}:\n{report.longreprtext}", flush=True)
