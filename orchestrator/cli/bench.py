"""The verbs under `bench`: experiments on the user's own GPU and models. What is measured and how is orchestrator/experiments.

Here are their options; bench_kinds.py has what is told and shown of each, bench_run.py what is alike for all.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from orchestrator.cli import options
from orchestrator.cli.bench_kinds import Bursts, Mix
from orchestrator.cli.bench_run import Run

Verb = TypeVar("Verb", bound=Callable[..., Any])
TOLERATED = "512MiB"


class Bench(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Bench)
@options.shared
def bench() -> None:
    """Show on this machine's GPU and models what the daemon is for.

    Run it where the daemon runs: GPU memory is read from the driver, past the daemon. Results (JSON, CSV, pictures) go to a
    folder of their own. On simulated GPUs everything works, and every output says that they were.

    \b
    Examples:
      orchestratorctl bench single qwen
      orchestratorctl bench shared qwen llama --no-static
      orchestratorctl bench mix qwen llama mistral --rate 2 --duration 5m
    """


def pause(text: str) -> float:
    """A duration, or 0."""
    return 0.0 if text.strip() in ("0", "0s") else options.seconds(text)


def shared_options(verb: Verb) -> Verb:
    """What all experiments take."""
    for option in reversed((
        click.option("--yes", "-y", is_flag=True, help="Do not ask."),
        click.option("--out", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
                     help="Folder of the results. [default: ./orchestratorctl-bench-NAME-TIME]"),
        click.option("--api-key", envvar="OPENAI_API_KEY", metavar="KEY",
                     help="A key of the users' endpoint, where it needs one. [env: OPENAI_API_KEY]"),
        click.option("--request-timeout", type=options.seconds, default="120s", metavar="D", show_default=True,
                     help="A request that takes longer has failed."),
        click.option("--foreign-tolerance", default=TOLERATED, metavar="SIZE", show_default=True,
                     help="Stop where other processes take this much more of the GPU meanwhile."),
        click.option("--no-plots", is_flag=True, help="No pictures: tables, JSON and CSV only."),
        options.shared,
    )):  # fmt: skip
        verb = option(verb)
    return verb


def bursts_options(requests: int, turns: int, pause_s: str, turns_flag: str) -> Callable[[Verb], Verb]:
    """What single and shared take."""

    def add(verb: Verb) -> Verb:
        for option in reversed((
            click.option(turns_flag, "turns", type=click.IntRange(1), default=turns, metavar="N", show_default=True,
                         help="Bursts of each model."),
            click.option("--requests", type=click.IntRange(1), default=requests, metavar="N", show_default=True,
                         help="Requests of a burst, all at once."),
            click.option("--tokens", type=click.IntRange(2), default=180, metavar="N", show_default=True, help="Of each answer."),
            click.option("--prompt-tokens", type=click.IntRange(1), default=128, metavar="N", show_default=True, help="Of each prompt."),
            click.option("--pause", "pause_s", type=pause, default=pause_s, metavar="D", show_default=True, help="Between two bursts."),
            click.option("--rounds", type=click.IntRange(1), default=1, metavar="N", show_default=True,
                         help="How often all of it, one arm after the other."),
            click.option("--settle", "settle_s", type=pause, default="20s", metavar="D", show_default=True,
                         help="At most so long until the memory of an idle engine is still, before and after the bursts."),
            click.option("--static-utilization", type=click.FloatRange(0.01, 1.0), default=0.9, metavar="X", show_default=True,
                         help="What the static engines may have of the GPU, all together."),
            click.option("--no-static", is_flag=True, help="Leave the plain vLLM out: nothing is unloaded."),
            click.option("--engine-python", type=click.Path(dir_okay=False), metavar="FILE",
                         help="Python that runs the plain vLLM. [default: that of the model's engine venv]"),
        )):  # fmt: skip
            verb = option(verb)
        return verb

    return add


@bench.command()
@options.name_argument
@bursts_options(6, 3, "6s", "--bursts")
@shared_options
@click.pass_obj
def single(call: options.Call, /, name: str, **given: Any) -> None:
    """One model under bursts: through the daemon, and on a plain vLLM with a static pool.

    Memory idle, at its peak and at the end, and latencies of both. For the second half the model is unloaded in the daemon and
    a vLLM without kvcached takes its place; afterwards the model is as it was. Other models are left alone.

    \b
    Examples:
      orchestratorctl bench single qwen
      orchestratorctl bench single qwen --static-utilization 0.5 --rounds 3 --yes
      orchestratorctl bench single qwen --bursts 5 --requests 32 --tokens 400 --json
    """
    Run(call, given).run(Bursts("single", [name], given))


@bench.command("shared")
@options.names_argument
@bursts_options(4, 4, "5s", "--turns")
@shared_options
@click.pass_obj
def shared_verb(call: options.Call, /, names: tuple[str, ...], **given: Any) -> None:
    """Several models in turns: who holds how much of the GPU over time.

    The models alternate bursts. Then the same on static vLLM engines side by side, which divide --static-utilization evenly.

    \b
    Examples:
      orchestratorctl bench shared qwen llama
      orchestratorctl bench shared qwen llama mistral --no-static --out results
    """
    Run(call, given).run(Bursts("shared", names, given))


@bench.command("mix")
@options.names_argument
@click.option("--duration", "seconds", type=options.seconds, default="3m", metavar="D", show_default=True, help="How long requests come.")
@click.option("--rate", type=click.FloatRange(0.001), default=2.0, metavar="R", show_default=True,
              help="Requests a second, of all models together, on average.")  # fmt: skip
@click.option("--alpha", type=click.FloatRange(0.0), default=1.0, metavar="A", show_default=True,
              help="Of Zipf's law: the N-th model named is asked 1/N^A as often as the first; 0: all alike.")  # fmt: skip
@click.option("--burstiness", "variation", type=click.FloatRange(0.0, 20.0), default=3.0, metavar="CV", show_default=True,
              help="Coefficient of variation of the gaps between requests: 1 is Poisson, above it they come in bursts.")  # fmt: skip
@click.option("--on", "on_s", type=pause, default="0", metavar="D", help="Requests come for so long, [default: all the time]")
@click.option("--off", "off_s", type=pause, default="0", metavar="D", help="and then none for so long.")
@click.option("--trace", type=click.Choice(["conversation", "code"]), default="conversation", show_default=True,
              help="Lengths as in this Azure LLM inference trace of 2023.")  # fmt: skip
@click.option("--scale", type=click.FloatRange(0.001, 10.0), default=1.0, metavar="X", show_default=True, help="All lengths times this.")
@click.option("--seed", type=int, default=0, metavar="N", show_default=True, help="The same seed makes the same requests.")
@click.option("--ttft-slo", "ttft_s", type=options.seconds, metavar="D",
              help="Promised until the first token. [default: 5 times each model's p95 alone]")  # fmt: skip
@click.option("--tpot-slo", "tpot_s", type=options.seconds, metavar="D",
              help="Promised for each token after it. [default: 2 times each model's p95 alone]")  # fmt: skip
@click.option("--calibration", type=click.IntRange(1), default=5, metavar="N", show_default=True,
              help="Requests of each model alone, from which the defaults of the two are found.")  # fmt: skip
@shared_options
@click.pass_obj
def mix_verb(call: options.Call, /, names: tuple[str, ...], **given: Any) -> None:
    """Many models, some popular, asked in bursts: what is answered as promised, refused, started and woken.

    Name the models by popularity. Lengths follow public traces, arrivals a gamma process, popularity Zipf's law; a seed makes
    it repeatable. Goodput is the part of all requests whose first token and pace were as promised.

    \b
    Examples:
      orchestratorctl bench mix qwen llama mistral
      orchestratorctl bench mix a b c d e f --rate 5 --alpha 1.2 --burstiness 3 --duration 10m
      orchestratorctl bench mix a b c --on 20s --off 40s --ttft-slo 2s --tpot-slo 0.05s
    """
    if bool(given["on_s"]) != bool(given["off_s"]):
        raise click.UsageError("--on and --off belong together: --on 20s --off 40s")
    Run(call, given).run(Mix(names, given))
