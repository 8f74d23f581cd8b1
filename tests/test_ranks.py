"""The pool of ranks itself, and DeepSpeed engines one after another in it."""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import psutil
import pytest
import torch

from tests.ranks import MAX_POOLS, RankError, cleanup_engine, run_ranks


class PayloadError(ValueError):
    pass


def rank_total(offset, scale=1.0):
    value = torch.tensor([scale * (torch.distributed.get_rank() + offset)])
    torch.distributed.all_reduce(value)
    return torch.distributed.get_rank(), value


def identity():
    return os.getpid(), os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]


def disturb_state():
    os.environ["RANK_TEST_LEAK"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.rand(3)


def seen_state():
    return os.environ.get("RANK_TEST_LEAK"), os.getcwd(), torch.rand(1), torch.get_num_threads()


def fail_on(rank, how):
    print("said before the end")
    if torch.distributed.get_rank() == rank:
        if how == "raise":
            raise PayloadError(f"bad payload at {rank}")
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()  # never completes: the failing rank does not come


def hang_on(rank):
    if torch.distributed.get_rank() != rank:
        torch.distributed.barrier()
    time.sleep(3600 if torch.distributed.get_rank() == rank else 0)


def spawn_child():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]).pid


def gone(pids):
    """Wait for these processes to end; the ones that did not."""
    alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return psutil.wait_procs(alive, timeout=20)[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_answers_in_rank_order(world_size):
    results = run_ranks(world_size, rank_total, 2, scale=0.5)
    total = 0.5 * sum(range(2, 2 + world_size))
    assert [rank for rank, _ in results] == list(range(world_size))
    assert all(value.item() == total for _, value in results)


def test_pool_persists_between_calls_and_ranks_know_themselves():
    first = run_ranks(2, identity)
    assert first == run_ranks(2, identity)
    assert [entry[1:] for entry in first] == [("0", "0", "2"), ("1", "1", "2")]
    assert len({pid for pid, *_ in first} | {os.getpid()}) == 3


def test_every_call_starts_from_the_same_state():
    before = run_ranks(1, seen_state)
    run_ranks(1, disturb_state)
    assert run_ranks(1, seen_state) == before
    assert before[0][0] is None
    assert before[0][3] == 1


def test_an_exception_carries_rank_traceback_log_and_cause():
    with pytest.raises(RankError, match="rank 1 of 2") as caught:
        run_ranks(2, fail_on, 1, "raise")
    assert isinstance(caught.value.__cause__, PayloadError)
    assert "PayloadError: bad payload at 1" in caught.value.tracebacks[1]
    assert "fail_on" in caught.value.tracebacks[1]
    assert "said before the end" in str(caught.value)


def test_pool_is_rebuilt_after_a_failure():
    before = run_ranks(2, identity)
    with pytest.raises(RankError):
        run_ranks(2, fail_on, 0, "raise")
    assert gone(pid for pid, *_ in before) == []
    after = run_ranks(2, identity)
    assert {pid for pid, *_ in before}.isdisjoint(pid for pid, *_ in after)
    assert run_ranks(2, rank_total, 0)[0][1].item() == 1.0


def test_a_killed_rank_is_reported_with_its_status():
    with pytest.raises(RankError) as caught:
        run_ranks(2, fail_on, 1, "die")
    assert caught.value.tracebacks[1] == "the process died with exit status -9"


def test_a_hanging_collective_ends_with_the_stacks():
    pids = [pid for pid, *_ in run_ranks(2, identity)]
    with pytest.raises(RankError, match="rank 0, 1 failed") as caught:
        run_ranks(2, hang_on, 1, timeout_seconds=1.0)
    assert "no answer within 1 s" in caught.value.tracebacks[0]
    assert "in hang_on" in str(caught.value)
    assert gone(pids) == []


def test_children_of_a_rank_end_with_it():
    child = run_ranks(1, spawn_child)[0]
    assert psutil.pid_exists(child)
    with pytest.raises(RankError):
        run_ranks(1, fail_on, 0, "raise")
    assert gone([child]) == []


def test_the_pool_unused_for_longest_is_ended():
    oldest = run_ranks(MAX_POOLS + 1, identity)
    for world_size in range(1, MAX_POOLS + 1):
        run_ranks(world_size, identity)
    assert gone(pid for pid, *_ in oldest) == []


def test_a_function_without_a_name_is_refused():
    with pytest.raises(ValueError, match="not a module-level function"):
        run_ranks(1, lambda: None)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_when_the_test_process_does(tmp_path, signal_number):
    script = tmp_path / "starts_ranks.py"
    script.write_text(
        "from pathlib import Path\n"
        "from tests import ranks\n"
        "def hang(folder):\n"
        "    import os, time\n"
        "    (Path(folder) / os.environ['RANK']).write_text(str(os.getpid()))\n"
        "    time.sleep(3600)\n"
        "if __name__ == '__main__':\n"
        "    import signal, starts_ranks\n"
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    ranks.run_ranks(2, starts_ranks.hang, str(Path(__file__).parent))\n"
    )
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{tmp_path}", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL
    )
    files = [tmp_path / "0", tmp_path / "1"]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None and time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.1)
    family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert {int(file.read_text()) for file in files} < set(family)  # and the host
    process.send_signal(signal_number)
    process.wait(30)
    assert gone(family) == []


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(32, 16)
        self.inner = torch.nn.Linear(16, 16)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        logits = (hidden + self.inner(hidden)) @ self.embedding.weight.t()
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


def train_and_clean_up(stage, bf16):
    """Losses of a few steps, and whether anything of the engine is still alive after clean-up."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "steps_per_print": 10**9,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    tokens = torch.randint(0, 32, (2, 8))
    losses = []
    for _ in range(6):
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    watched = [weakref.ref(thing) for thing in (engine, model, engine.optimizer)]
    cleanup_engine(engine)
    del engine, model, optimizer, loss
    gc.collect()
    return losses, [reference() is not None for reference in watched]


PRECISIONS = [(stage, False) for stage in range(4)] + [(stage, True) for stage in (1, 2, 3)]


def test_engines_come_and_go_in_one_process():
    """Every stage and precision twice, one after another: the same losses, nothing kept."""
    pids = [pid for pid, *_ in run_ranks(2, identity)]
    first = {key: run_ranks(2, train_and_clean_up, *key) for key in PRECISIONS}
    second = {key: run_ranks(2, train_and_clean_up, *key) for key in reversed(PRECISIONS)}
    assert pids == [pid for pid, *_ in run_ranks(2, identity)]
    for key in PRECISIONS:
        for (losses, alive), (again, _) in zip(first[key], second[key], strict=True):
            assert losses == again, key
            assert losses[-1] < losses[0], key
            assert alive == [False, False, False], key
