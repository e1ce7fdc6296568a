"""A mixer is one class and one letter: two toy mixers, added here, train and decode in every way the library has.

Covers: nanochat.mixer, nanochat.positions, nanochat.cache.
"""

import copy

import pytest
import torch
from torch import nn

from nanochat.cache import LayerCache
from nanochat.checkpoint import save_checkpoint
from nanochat.distributed import Ranks
from nanochat.engine import Batch, Engine, Row
from nanochat.errors import UserError
from nanochat.gpt import GPT, MIXERS, Block, GPTConfig
from nanochat.layers import Linear
from nanochat.loading import ready_to_decode
from nanochat.mixer import Mixer
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.sampling import Settings
from nanochat.server.messages import RowRequest
from nanochat.server.scheduler import Scheduler
from nanochat.tokenizer import RustBPETokenizer
from tests.helpers import PARTS, small_model


class MovingAverage(Mixer):
    """m[t] = a·m[t−1] + (1 − a)·u[t] for each channel: what it remembers has a fixed size, one tensor per row."""

    def __init__(self, config):
        super().__init__(config)
        self.u_proj = Linear(config.n_embd, config.n_embd)
        self.decay = nn.Parameter(torch.zeros(config.n_embd))
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def projections(self):
        return [self.u_proj]

    def new_cache(self, max_rows, max_len, device, dtype):
        return LayerCache(per_row={"mean": torch.zeros(max_rows, self.decay.shape[0], device=device, dtype=dtype)})

    def mix(self, z, positions, cache):
        u, a = z[..., :self.decay.shape[0]], torch.sigmoid(self.decay).to(z.dtype)
        mean = torch.zeros_like(u[:, 0]) if cache is None else cache.per_row["mean"]
        means = [mean]
        for t in range(u.shape[1]):
            means.append(a * means[-1] + (1 - a) * u[:, t])
        means = torch.stack(means, dim=1)
        if cache is not None:
            mean.copy_(positions.last(means, 1)[:, 0])
        return means[:, 1:]

    def init_weights(self):
        super().init_weights()
        nn.init.zeros_(self.decay)

    def optimizer_group(self, name):
        return "taps" if name == "decay" else super().optimizer_group(name)


class PlainMean(Mixer):
    """The mean of all tokens so far: it keeps something per token. It overrides `forward`, without joined
    projections."""

    def __init__(self, config):
        super().__init__(config)
        self.u_proj = Linear(config.n_embd, config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def new_cache(self, max_rows, max_len, device, dtype):
        shape = max_rows, max_len, self.u_proj.weight.shape[1]
        return LayerCache(per_token={"u": torch.zeros(shape, device=device, dtype=dtype)})

    def forward(self, h, positions, cache=None):
        u = self.u_proj(h)
        if cache is None:
            seen = torch.ones(1, 1, h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()
        else:
            positions.write(cache.per_token["u"], u)
            u = cache.per_token["u"][:, :positions.end]
            seen = positions.mask(None)
            if seen is None:  # uniform rows: the causal mask, cut to the new tokens
                seen = torch.ones(1, 1, positions.end, positions.end, dtype=torch.bool, device=h.device).tril()
                seen = seen[:, :, -positions.T:]
        weights = seen[:, 0].to(u.dtype)
        u = torch.where(seen[:, 0].any(1).unsqueeze(-1), u, 0)  # behind a row's end memory may hold anything
        return self.c_proj(weights @ u / weights.sum(-1, keepdim=True))


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    """One dict entry a mixer; nothing else in the library is told."""
    monkeypatch.setitem(MIXERS, "E", MovingAverage)
    monkeypatch.setitem(MIXERS, "M", PlainMean)


ALONE = Ranks(0, 0, 1, torch.device("cpu"))
PATTERNS = ["SEAM", "EEEE", "MMMM", "AESM"]
SHAPES = {pattern: {"layer_pattern": pattern} for pattern in PATTERNS} | {
    name: {"layer_pattern": "SAAS", **parts} for name, parts in PARTS.items()}  # and the library's own, with all parts


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(["what is 12+30? it is 42", "spell: a,b,c"] * 3, 280)


def model_of(shape, tokenizer=None, seed=0):
    """shape: a name in SHAPES, or a pattern."""
    vocab_size = tokenizer.get_vocab_size() if tokenizer else 97
    return small_model(seed, sequence_len=64, vocab_size=vocab_size, **SHAPES.get(shape, {"layer_pattern": shape}))


@pytest.fixture(params=SHAPES)
def model(request):
    return model_of(request.param)


def test_it_trains_and_every_parameter_has_a_group(model):
    torch.manual_seed(0)
    model = GPT(model.config)
    optimizer = MuonAdamW(parameter_groups(model), ALONE)
    names = {name for name, _ in model.named_parameters()}
    assert {name for bucket in optimizer.buckets for name in bucket.names} == names
    ids, moved, losses = torch.randint(97, (4, 32)), set(), []
    for _ in range(8):
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss.item())
        moved |= {name for name, p in model.named_parameters() if p.grad.abs().sum() > 0}
        optimizer.step(lr_scale=0.3)
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1 and moved == names
    multiplied = sum(p.numel() for name, p in model.named_parameters()
                     if p.ndim == 2 and not name.endswith(("wte.weight", "value_embed.weight")))
    A = model.config.pattern().count("A")
    multiplied += A * 3 * model.config.n_embd * model.config.attn_conv
    assert model.flops_per_token(32) == 6 * multiplied + 6 * 32 * model.config.n_embd * A


@pytest.mark.parametrize("chunks", [(29,), (1,) * 29, (3, 1, 1, 17, 2, 5)])
def test_any_split_into_chunks_is_one_full_forward(model, chunks):
    ids = torch.randint(97, (2, 29))
    with torch.inference_mode():
        cache = model.new_cache(2, max_len=4)  # too short: it has to grow
        parts = [model(part, cache=cache) for part in ids.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-4, atol=1e-4)


def test_rows_of_different_lengths_forked_selected_and_copied(model):
    rows = [torch.randint(97, (sum(counts),)) for counts in ((5, 1, 1), (9, 4, 1), (2, 6, 1))]
    with torch.inference_mode():
        cache, done = model.new_cache(3, max_len=2), [0, 0, 0]
        for counts in ((5, 9, 2), (1, 4, 6)):
            ids = torch.randint(97, (3, max(counts)))
            for b, n in enumerate(counts):
                ids[b, :n] = rows[b][done[b]:done[b] + n]
            model(ids, cache=cache, counts=list(counts))
            done = [d + n for d, n in zip(done, counts)]
        other = model.new_cache(1, max_len=1)
        other.resize(2)
        for to, of in ((0, 2), (1, 0)):
            other.copy_row(to, cache, of)
        wanted = [model(row[None])[0, -1] for row in rows]
        last = torch.stack([row[-1] for row in rows])
        for some, order in ((cache.select([1, 0, 1]), [1, 0, 1]), (cache.fork(2), [0, 0, 1, 1, 2, 2]), (other, [2, 0]),
                            (cache, [0, 1, 2])):
            got = model(last[order][:, None], cache=some)[:, -1]
            torch.testing.assert_close(got, torch.stack([wanted[i] for i in order]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("pattern", SHAPES)
def test_a_static_step_gives_what_an_ordinary_one_gives(pattern, ready, tokenizer):
    model = model_of(pattern, tokenizer)
    if ready:
        model = ready_to_decode(model)
        assert model.has_single_row_step() == ("M" not in pattern)  # PlainMean has none, and says so
    prompts = [list(range(n, 3 * n, 2)) for n in (3, 11, 1, 7)]
    for batch_size in (1, 3):  # 1: the single-row step, where the model has one
        options = {"max_tokens": 20, "temperature": 1.1, "top_k": 20, "batch_size": batch_size}
        engines = [Engine(model, tokenizer, graphs=graphs) for graphs in (False, True)]
        plain, static = ([[row.tokens for row in rows] for rows in engine.generate_many(prompts, **options)]
                         for engine in engines)
        assert plain == static
    batches = [Batch(Engine(model, tokenizer, graphs=graphs)) for graphs in (False, True)]
    for batch in batches:
        batch.add_prompts([Row([3, 1, 4, 1, 5], 12, Settings(temperature=0), stops=())])
    for _ in range(11):
        for batch in batches:
            batch.step()
        torch.testing.assert_close(batches[0]._logits, batches[1]._logits, rtol=1e-4, atol=1e-4)
    assert batches[1]._static is not None


def test_the_single_row_step_is_used_and_is_forward(tokenizer, monkeypatch):
    model, calls, real = ready_to_decode(model_of("SEAE", tokenizer)), [0], Block.single_row_step

    def counted(*args):
        calls[0] += 1
        return real(*args)

    monkeypatch.setattr(Block, "single_row_step", counted)
    batch = Batch(Engine(model, tokenizer, graphs=True))
    row = Row([3, 1, 4], 9, Settings(seed=1), stops=())
    batch.add_prompts([row])
    for _ in range(8):
        batch.step()
        with torch.inference_mode():
            torch.testing.assert_close(batch._logits[0], model(torch.tensor([[*row.prompt, *row.tokens]]))[0, -1],
                                       rtol=1e-4, atol=1e-4)
    assert calls[0] >= 8 * 4


@pytest.mark.parametrize("pattern", SHAPES)
def test_prefixes_are_reused_and_rows_are_batch_invariant(pattern, tokenizer):
    model = model_of(pattern, tokenizer)
    chat = [(7 * i) % 250 for i in range(40)]

    def answer(scheduler, id, prompt):
        scheduler.submit(RowRequest(id, prompt, 8, Settings(temperature=0), stops=()))
        events = []
        while scheduler.busy:
            events += scheduler.step()
        return [event.token for event in events if event.kind == "token" and event.id == id], events

    scheduler = Scheduler(Engine(model, tokenizer, graphs=False), max_rows=3, chunk=8)
    first, _ = answer(scheduler, "a", chat[:30])
    again, events = answer(scheduler, "b", chat[:35])
    assert next(event.cached for event in events if event.kind == "started" and event.id == "b") >= 24
    for prompt, got in ((chat[:30], first), (chat[:35], again)):
        fresh = Scheduler(Engine(model, tokenizer, graphs=False), max_rows=1, chunk=8, prefix_bytes=0)
        assert answer(fresh, "x", prompt)[0] == got
    for i in range(3):  # three at once: each is answered as alone
        scheduler.submit(RowRequest(f"c{i}", chat[:20 + i], 8, Settings(temperature=0), stops=()))
    events = []
    while scheduler.busy:
        events += scheduler.step()
    for i in range(3):
        fresh = Scheduler(Engine(model, tokenizer, graphs=False), max_rows=1, chunk=8, prefix_bytes=0)
        got = [event.token for event in events if event.kind == "token" and event.id == f"c{i}"]
        assert answer(fresh, "x", chat[:20 + i])[0] == got


def test_it_is_saved_and_loaded_and_refused_where_nobody_knows_the_letter(model, tmp_path, monkeypatch):
    from nanochat.checkpoint import load_checkpoint
    from nanochat.loading import model_from_state
    save_checkpoint(tmp_path, 3, model.state_dict(), {"model_config": model.config.to_dict()})
    found = load_checkpoint(tmp_path)
    loaded = model_from_state(found.meta["model_config"], found.model_state)
    ids = torch.randint(97, (2, 9))
    assert torch.equal(loaded(ids), model(ids)) and loaded.config == model.config
    monkeypatch.setattr("nanochat.config.MIXERS", {})
    with pytest.raises(UserError, match="layer_pattern"):
        model_from_state(found.meta["model_config"], found.model_state)


def test_it_is_quantised(model):
    ids = torch.randint(97, (2, 21))
    exact = model(ids)
    int8 = ready_to_decode(copy.deepcopy(model), "int8")
    with torch.inference_mode():
        full = int8(ids)
        assert (full - exact).norm() < 0.1 * exact.norm()
        cache = int8.new_cache(2, 4)
        parts = [int8(part, cache=cache) for part in ids.split((5, 1, 1, 9, 1, 1, 3), dim=1)]
        assert (torch.cat(parts, dim=1) - full).norm() < 0.05 * full.norm()
    assert not int8.has_single_row_step()


# ---- mixers that are not complete are refused with a sentence

class NoCache(MovingAverage):
    new_cache = Mixer.new_cache


class NoRule(MovingAverage):
    optimizer_group = Mixer.optimizer_group


class WrongShape(MovingAverage):
    def new_cache(self, max_rows, max_len, device, dtype):
        return LayerCache(per_token={"mean": torch.zeros(max_rows, self.decay.shape[0])})


@pytest.mark.parametrize("wrong, use, said", [
    (NoCache, lambda model: model.new_cache(1), "NoCache cannot decode: it defines no new_cache"),
    (NoRule, parameter_groups, r"transformer\.h\.0\.attn\.decay"),
    (WrongShape, lambda model: model.new_cache(2, 8), r"WrongShape\.new_cache\(2, 8\) must give"),
])
def test_an_incomplete_mixer_is_refused(wrong, use, said, monkeypatch):
    monkeypatch.setitem(MIXERS, "E", wrong)
    model = model_of("EEEE")
    assert model(torch.randint(97, (1, 5))).shape == (1, 5, 97)
    with pytest.raises((ValueError, NotImplementedError), match=said):
        use(model)


def test_unknown_letters_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="S for SLC2 or A for Attention or E for MovingAverage or M for PlainMean"):
        GPTConfig(layer_pattern="X" * 16)
