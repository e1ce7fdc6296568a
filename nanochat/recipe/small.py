"""A recipe for a CPU: 4 layers, the small world."""

from dataclasses import replace

from nanochat.recipe.parts import IdentityRecipe
from nanochat.recipe.published import published

small = replace(
    published,
    source="small-world",
    docs=20_000,                   # more than base training reads
    tokenizer=replace(published.tokenizer, vocab_size=2048),  # the small world has few words
    stages=("base", "mid", "sft", "rl"),
    base=replace(
        published.base,
        # Parts beyond the published ones: by the training loss, 350 steps with them are worth 500 without. Without
        # attn_conv four layers do not learn in this time to find a word further up and what stands beside it.
        shape=replace(published.base.shape, depth=4, max_seq_len=256, slc_gate_init="unit", slc_norm=True, attn_conv=4,
                      qk_gain=1.2, lambdas=True, value_embeds="A"),
        horizon=replace(published.base.horizon, num_iterations=350),
        # 350 x 2048 = 0.72M tokens. Many small steps, since the facts are learnt by the step more than by the token.
        total_batch_size=2048,
        device_batch_size=8,
        rates=replace(published.base.rates, warmdown_ratio=0.3),
        eval_every=125,
        eval_tokens=65_536,
        sample_every=-1,
        save_every=125,
    ),
    base_eval=replace(published.base_eval, device_batch_size=8, split_tokens=65_536),
    identity=IdentityRecipe(short=True, count=300),
    mid=replace(
        published.mid,
        num_iterations=200,
        total_batch_size=2048,
        device_batch_size=8,
        eval_every=50,
        eval_tokens=20_000,
        save_every=50,
        mixture={"identity": 1, "questions": 2000, "choices": 2500, "lookups": 1500, "sums": 2500, "spelling": 2000,
                 "bee": 3000},
        validation={"each": 80},
    ),
    sft=replace(
        published.sft,
        num_iterations=100,
        device_batch_size=16,
        init_lr_frac=0.3,          # after so few steps of mid-training there is still much to learn
        eval_every=25,
        eval_steps=4,
        eval_metrics_every=-1,     # the grading that follows tells
        save_every=50,
        mixture={"identity": 1, "questions": 1000, "choices": 1500, "lookups": 500, "sums": 800, "spelling": 300,
                 "bee": 1000},
        validation={"each": 80},
    ),
    rl=replace(
        published.rl,
        num_iterations=25,         # from 94.7 to 97.5 % of the sums in a minute and a half; more steps gave little more
        examples_per_step=32,
        device_batch_size=64,
        rollout_batch_size=256,
        max_new_tokens=48,         # its answers are short
        init_lr_frac=0.1,
        eval_every=-1,
        eval_examples=200,
        save_every=10,
    ),
    chat_eval=replace(published.chat_eval, max_new_tokens=128),
)
