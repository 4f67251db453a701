"""`itmc test`: run the tests in policy files, through the semantics or a real kernel."""

from collections.abc import Callable

import click

from itmlang.diagnostics import CompileError
from itmlang.pipeline import Compiled
from itmlang.semantics import PATHS
from itmlang.trials import Failure, Send, Trial, run
from runtime.cli.exits import POLICY_WRONG
from runtime.cli.files import compiled
from runtime.cli.output import say, show
from runtime.errors import MachineError
from runtime.simulated import doer

# (failures, why it was not run)
_Result = tuple[tuple[Failure, ...], str]


@click.command()
@click.argument("files", nargs=-1, type=click.Path())
@click.option("--kernel", is_flag=True, help="Before a real kernel, in throwaway namespaces. Root.")
@click.option(
    "--path", type=click.Choice(list(PATHS)), default="forward", show_default=True,
    help="The way of packets for which a test names none.",
)  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, help="Show what each failed packet met.")
def command(files: tuple[str, ...], kernel: bool, path: str, verbose: bool) -> None:
    """Run the tests in policy FILES. No root needed, but for --kernel.

    With --kernel, a test that waits longer than 10 s is not run, and said to be.

    A failure shows the packet, what was expected, what came and the line that decided.
    """
    runner: Callable[[Compiled, Trial, str], _Result] = _in_kernel if kernel else _in_python
    wrong, total, packets, failed, left = False, 0, 0, 0, 0
    for name in files or (None,):
        try:
            result = compiled(name)
        except CompileError as error:
            show(error.diagnostics)
            wrong = True
            continue
        if not result.trials:
            say(f"{result.source.name}: no tests")
        for trial in result.trials:
            failures, not_run = runner(result, trial, path)
            total += 1
            if not not_run:
                packets += sum(step.count for step in trial.steps if isinstance(step, Send))
            failed += bool(failures)
            left += bool(not_run)
            _report(trial, failures, not_run, verbose)
    say(_summary(total, packets, failed, left))
    if failed or wrong:
        raise click.exceptions.Exit(POLICY_WRONG)


def _in_python(result: Compiled, trial: Trial, path: str) -> _Result:
    return tuple(run(trial, path, doer(trial.policies, result.source.name))), ""


def _in_kernel(result: Compiled, trial: Trial, path: str) -> _Result:
    from runtime.lab import LabError
    from runtime.nft import NftRefusalError
    from runtime.traffic import TrafficError
    from runtime.trials import run_in_kernel

    try:
        done = run_in_kernel(result.source, trial, path)
    except NftRefusalError as error:
        raise MachineError(f"nftables refused the test's ruleset: {error}") from error
    except (LabError, TrafficError) as error:
        raise MachineError(str(error), "tests before the kernel need root and veth") from error
    return done.failures, done.not_run


def _report(trial: Trial, failures: tuple[Failure, ...], not_run: str, verbose: bool) -> None:
    place = f"{trial.span.source.name}:{trial.span.line}"
    if not_run:
        say(f"not run  {place}: {trial.name}: {not_run}")
        return
    say(f"{'FAILED' if failures else 'ok':<7}  {place}: {trial.name}")
    for failure in failures:
        _explain(failure, verbose)


def _explain(failure: Failure, verbose: bool) -> None:
    send = failure.send
    number = (
        f", packet {failure.number} of {send.count}" if failure.number and send.count > 1 else ""
    )
    say(f"    line {send.span.line}{number}: {send.text}")
    say(f"      expected  {' '.join(failure.expected.span.text.split())}"
        if failure.expected.span is not send.span else "      expected  accept")  # fmt: skip
    say(f"      came      {failure.came}")
    if failure.decided is not None:
        span = failure.decided
        say(f"      decided   {span}: {' '.join(span.text.split())}")
    if verbose:
        for line in failure.lines:
            say(
                f"        {line.section:<9} line {line.span.line:<5} {line.text}  {line.result}".rstrip()
            )


def _summary(total: int, packets: int, failed: int, left: int) -> str:
    parts = [f"{total} test{'s' * (total != 1)}", f"{packets} packets"]
    parts += [f"{failed} failed"] if failed else []
    parts += [f"{left} not run"] if left else []
    return ", ".join(parts) + ("" if failed or left else ", all as expected" if total else "")
