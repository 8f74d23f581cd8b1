"""What an experiment file says: data, one base configuration, arms, seeds."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sparse_gpt.config import Fraction, Positive, Section
from sparse_gpt.config_file import read_tree, validate

NAME = r"^[A-Za-z0-9][A-Za-z0-9_]*$"  # of experiments, arms and corpora: parts of file names
Name = Annotated[str, Field(pattern=NAME)]
Seed = Annotated[int, Field(ge=0)]


class Corpus(Section):
    """Text to prepare if it is not there, as `launch/prepare_data.py` does; or a prepared `path`.

    `input`: files and folders, where `$NAME` stands for a variable of the environment.
    `tokenizer`: a kind to train, the path of one, or `tokenizer_of` another corpus.
    `vocab_size`: of a tokenizer that is trained; of any other, what plans count with until the
    data is there.
    """

    path: Path | None = None
    input: str | tuple[str, ...] | None = None
    dataset: str | None = None
    config: str | None = None
    splits: dict[str, str] | None = None  # ours: theirs, of a data set
    text_field: str = "text"
    wikitext: Literal["raw", "detokenised"] | None = None
    max_bytes: Positive | None = None
    tokenizer: str = "sentencepiece"
    tokenizer_of: Name | None = None
    vocab_size: Positive | None = None
    tokenizer_sample_bytes: Positive = 10_000_000
    val_fraction: Fraction = 0.01
    val_documents: Positive | None = None
    test_fraction: Fraction = 0.0
    test_documents: Positive | None = None
    seed: Seed = 0  # of the held-out documents

    @model_validator(mode="after")
    def _check(self) -> "Corpus":
        given = [key for key in ("path", "input", "dataset") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, input, dataset (given: {given or 'none'})")
        if self.dataset is None and (self.config is not None or self.splits is not None):
            raise ValueError("config and splits go with dataset")
        return self


class Arm(Section):
    """Runs that differ from the base in `settings` (`dotted.key: value`), one a seed.

    `like` another arm: with its settings, too. With `match_flops` the arm is the baseline instead,
    given the whole-model FLOPs of that arm's run: by `tokens`, more (or fewer) steps; by `width`,
    another d_model, a multiple of the heads, and d_ff for the rest, at as many steps.
    `group`: arms shown together; where there is no `compare`, those of `main` are compared.
    """

    label: str | None = None
    group: str = "main"
    seeds: tuple[Seed, ...] | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    like: Name | None = None
    match_flops: Literal["tokens", "width"] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Arm":
        if self.match_flops is not None and self.like is None:
            raise ValueError("match_flops needs like: the arm whose FLOPs are matched")
        return self


class FinetuneStage(Section):
    """Fine-tune what was pretrained, in each of `modes`; runs without masks only in mode dense.

    `arms`: default, those of group main. `config`: that of a fine-tuning (`FinetuneConfig`), its
    `data` naming corpora of the experiment; what the experiment sets itself is left out.
    """

    modes: Annotated[tuple[Literal["dense", "sparse", "gradual"], ...], Field(min_length=1)] = (
        "dense",
        "sparse",
    )
    arms: tuple[Name, ...] | None = None
    config: dict[str, Any]


class LeaderboardStage(Section):
    """Score what was pretrained on the Open LLM Leaderboard: options of eval/leaderboard.py.

    `arms`: default, those of group main. `data`: a mirror of the data sets, where `$NAME` stands
    for a variable of the environment; None for the Hub.
    """

    arms: tuple[Name, ...] | None = None
    data: str | None = None
    shots: Literal["leaderboard", "zero"] = "leaderboard"
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    limit: Positive | None = None
    batch_size: Positive | Literal["auto"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class Stage(Section):
    """What follows the pretraining of every seed of an arm: one of these."""

    finetune: FinetuneStage | None = None
    leaderboard: LeaderboardStage | None = None

    @model_validator(mode="after")
    def _check(self) -> "Stage":
        if (self.finetune is None) == (self.leaderboard is None):
            raise ValueError("a stage is either finetune or leaderboard")
        return self

    @property
    def what(self) -> FinetuneStage | LeaderboardStage:
        stage = self.finetune or self.leaderboard
        assert stage is not None
        return stage


class Experiment(Section):
    """A grid of runs. `base` is a run's configuration; `base_config` a file it is added to.

    `data` of the base may name a corpus of this file (`data: [{path: novels}]`); where there is
    one corpus alone it need not. `ranks`: processes a run; `jobs`: runs side by side, default as
    many as cores or GPUs allow. `launcher`: arguments of the deepspeed command for runs on several
    nodes, e.g. [--hostfile, hosts]. `stages`: what follows each pretraining, in this order.
    """

    name: Name
    title: str = ""
    question: str = ""
    data: dict[Name, Corpus] = Field(default_factory=dict)
    base_config: Path | None = None
    base: dict[str, Any] = Field(default_factory=dict)
    seeds: tuple[Seed, ...] = (1,)
    baseline: Name
    arms: dict[Name, Arm]
    compare: tuple[tuple[Name, Name], ...] | None = None
    stages: tuple[Stage, ...] = ()
    ranks: Positive = 1
    jobs: Positive | None = None
    launcher: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "Experiment":
        if self.baseline not in self.arms:
            raise ValueError(f"baseline: {self.baseline} is no arm; arms: {', '.join(self.arms)}")
        if self.arms[self.baseline].match_flops is not None:
            raise ValueError(f"baseline: {self.baseline} cannot itself match another arm's FLOPs")
        for name, arm in self.arms.items():
            if arm.like is not None and arm.like not in self.arms:
                raise ValueError(f"arms.{name}.like: {arm.like} is no arm")
            seeds = self.seeds_of(name)
            if not seeds or len(set(seeds)) != len(seeds):
                raise ValueError(f"arms.{name}.seeds: {list(seeds)}: give each seed once")
            seen = [name]
            while (like := self.arms[seen[-1]].like) is not None:
                if like in seen:
                    raise ValueError(f"arms: like goes in a circle: {' -> '.join([*seen, like])}")
                seen.append(like)
        for pair in self.compare or ():
            for arm in pair:
                if arm not in self.arms:
                    raise ValueError(f"compare: {arm} is no arm; arms: {', '.join(self.arms)}")
        modes = [mode for stage in self.stages if stage.finetune for mode in stage.finetune.modes]
        if len(set(modes)) != len(modes):
            raise ValueError("stages: a mode of fine-tuning is given twice")
        if sum(stage.leaderboard is not None for stage in self.stages) > 1:
            raise ValueError("stages: leaderboard is given twice")
        for stage in self.stages:
            kind = "finetune" if stage.finetune else "leaderboard"
            for arm in stage.what.arms or ():
                if arm not in self.arms:
                    raise ValueError(f"stages.{kind}.arms: {arm} is no arm")
        for name, corpus in self.data.items():
            if corpus.tokenizer_of is not None and corpus.tokenizer_of not in self.data:
                raise ValueError(f"data.{name}.tokenizer_of: {corpus.tokenizer_of} is no corpus")
        return self

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        own = self.arms[arm].seeds
        return self.seeds if own is None else own

    def label_of(self, arm: str) -> str:
        return self.arms[arm].label or arm


def load_experiment(path: Path | str, overrides: tuple[str, ...] | list[str] = ()) -> Experiment:
    """Read an experiment file with `dotted.key=value` overrides. Raises `UserError`."""
    return validate(Experiment, read_tree(path, overrides), str(path))
