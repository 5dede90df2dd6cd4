"""Every served family: imported, trained in a layout of its own, resumed in another, exported;
transformers agrees.

A step's batch is the whole data set, so the first step's loss and gradient norm are those of the
imported model over all supervised tokens, and the evaluation after the last step is that of the
exported one.
"""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tsft.checkpoint.card import CARD_FILE, ModelCard
from megatron_tsft.checkpoint.convert import export_hf, import_hf
from megatron_tsft.checkpoint.verify import verify
from megatron_tsft.data.prepare import prepare
from megatron_tsft.errors import UserError
from megatron_tsft.plan.flags import Flags
from megatron_tsft.plan.layout import check_layout
from megatron_tsft.plan.start_weights import find_start_weights
from tests.training.runs import CHAT_TEMPLATE, Train, World, check_ran, make_hf, write_rows
from tests.training.test_against_transformers import dense_step, encoded
from tests.training.test_teachers import HELD, load

# on documents this short a factor of 8 would change the gradient norm by 3e-4 alone
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA = {
    "rope_parameters": LLAMA3_ROPE,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
TWO_OF_FOUR = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
QWEN3_MOE = TWO_OF_FOUR | {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
TP2, PP2, EP2 = (f"--{kind}-model-parallel-size 2" for kind in ("tensor", "pipeline", "expert"))
SP = "--sequence-parallel"
# attention is cut in two, experts are whole
TP2_EP2 = f"{TP2} {SP} {EP2} --expert-tensor-parallel-size 1"
# name -> architecture, what its config says, how two ranks
# share it, how two others do; "" is one rank
FAMILIES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama": ("LlamaForCausalLM", LLAMA, PP2, ""),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}, PP2, ""),
    "qwen2": ("Qwen2ForCausalLM", {}, f"{TP2} {SP}", ""),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 24}, TP2, ""),
    "qwen3-moe": ("Qwen3MoeForCausalLM", QWEN3_MOE, EP2, TP2_EP2),
    "mixtral": (
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        TP2_EP2,
        EP2,
    ),
}
# 30 conversations fill fewer packs
WHOLE = "--tsft-objective sft --seq-length 128 --global-batch-size 24".split()
Worlds = Callable[[str], World]


def letters_tokenizer() -> Any:
    """Byte-level BPE without merges, because transformers opens any tokenizer in a Qwen2 folder as
    a Qwen2Tokenizer."""
    import transformers

    vocabulary = ["<unk>", "<s>", "</s>", *sorted(set("plusisuserassistantw")), *"0123456789Ġ"]
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    ids = {token: i for i, token in enumerate(vocabulary)}
    return transformers.Qwen2Tokenizer(vocab=ids, merges=[], chat_template=CHAT_TEMPLATE, **special)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """worlds(family): its Hugging Face folder, imported, and data prepared with its tokenizer."""

    @functools.cache
    def make(family: str) -> World:
        architecture, config, *_ = FAMILIES[family]
        world = World(tmp_path_factory.mktemp(family))
        make_hf(world.hf, architecture, num_hidden_layers=2, **config)
        if family == "qwen2":
            letters_tokenizer().save_pretrained(str(world.hf))
        import_hf(world.hf, world.base, progress=False)
        for name, count, seed in (("train", 30, 0), ("held", 8, 1)):
            rows = write_rows(world.root / f"{name}.jsonl", count, seed)
            prepare(rows, world.hf, world.root / name, progress=False)
        return world

    return make


def start_of(world: World) -> tuple[str, ...]:
    evaluate = (*HELD, str(world.held), "--eval-interval", "3")
    return ("--tsft-model", str(world.base), "--tsft-data", str(world.train), *WHOLE, *evaluate)


def agree(ours: dict, theirs: dict, *keys: str) -> None:
    for key in keys:
        assert ours[key] == pytest.approx(theirs[key], rel=2e-5), key


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_from_import_to_export(train: Train, worlds: Worlds, tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    world, (_, _, layout, other) = worlds(family), FAMILIES[family]
    start = start_of(world)
    run = check_ran(
        train("run", *start, *layout.split(), "--save-interval", "2", ranks=2, steps=3, keep=True)
    )
    original = dense_step(load(world.hf), None, encoded(world, "train"), None)
    agree(run.rows[0], original, "tokens", "loss", "nll", "grad_norm")

    # the second step's checkpoint, its optimizer included,
    # in another layout: the third step is the same
    resume = ("--load", str(run.save), "--ckpt-step", "2", *other.split())
    again = check_ran(train("again", *start, *resume, ranks=2 if other else 1, steps=3, keep=True))
    assert [row["step"] for row in again.rows] == [3]
    agree(again.rows[0], run.rows[2], "tokens", "loss", "nll", "grad_norm")
    agree(again.heldout[0], run.heldout[0], "tokens", "nll")

    hf = tmp_path / "hf"
    export_hf(run.save, hf, progress=False)
    assert verify(hf, run.save, progress=False).passed
    before, after = tensors_of(world.hf), tensors_of(hf)
    assert before.keys() == after.keys()
    assert not [
        name for name in before if before[name].equal(after[name])
    ]  # every tensor was trained
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(hf), dtype=torch.float64, experts_implementation="eager", output_loading_info=True
    )
    model, report = loaded
    assert not any(report.values()), report  # missing, unexpected, mismatched
    agree(
        run.heldout[0],
        dense_step(model.eval(), None, encoded(world, "held"), None),
        "tokens",
        "nll",
    )

    tokenizer = AutoTokenizer.from_pretrained(str(hf))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "w1 w2 plus is"}], return_tensors="pt"
    )
    said = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]
    words = tokenizer.decode(said[: prompt["input_ids"].shape[1]], skip_special_tokens=True).split()
    assert words == ["user", "w1", "w2", "plus", "is"]
    assert len(said) == prompt["input_ids"].shape[1] + 4


@pytest.mark.slow
def test_experts_gathered_on_one_rank(train: Train, worlds: Worlds) -> None:
    """The weights of a run with parallel experts start a new run on one rank."""
    start = start_of(worlds("mixtral"))
    run = check_ran(
        train("run", *start, *EP2.split(), "--save-interval", "1", ranks=2, steps=2, keep=True)
    )
    alone = check_ran(
        train("alone", *start, "--load", str(run.save), "--ckpt-step", "1", "--finetune", steps=1)
    )
    agree(alone.rows[0], run.rows[1], "tokens", "loss", "nll", "grad_norm")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(EP2, ""), ("", EP2)], ids=["gathered", "spread"])
def test_the_optimizer_of_experts_stays_parallel_or_not(
    train: Train, worlds: Worlds, first: str, second: str
) -> None:
    """Megatron 0.19.2 keeps two optimizers where experts are parallel, else one, and cannot turn
    one into the other."""
    start = start_of(worlds("mixtral"))
    check_ran(train("run", *start, *first.split(), ranks=2 if first else 1, steps=1, keep=True))
    run = train("run", *start, *second.split(), ranks=2 if second else 1, steps=2, keep=True)
    assert (
        2 in run.codes
        and "its optimizer does not resume" in run.error
        and "--finetune" in run.error
    )


@pytest.mark.slow  # with its neighbours: they share the models
@pytest.mark.parametrize(
    ("family", "flags", "ranks", "words"),
    [
        ("mistral", {}, 2, "--expert-model-parallel-size 2: the model has no experts"),
        (
            "mixtral",
            {"expert_model_parallel_size": 3},
            3,
            "size 3 does not divide the model's 4 experts",
        ),
        ("mixtral", {}, 1, "1 processes are not a multiple of 2"),
        (
            "mixtral",
            {"tensor_model_parallel_size": 2},
            2,
            "not a multiple of 4.*--expert-tensor-parallel-size 1",
        ),
    ],
)
def test_layouts_of_experts(
    worlds: Worlds, family: str, flags: dict[str, int], ranks: int, words: str
) -> None:
    given = {
        "expert_model_parallel_size": 2,
        "micro_batch_size": 1,
        "global_batch_size": 6,
        "seq_length": 64,
    } | flags
    with pytest.raises(UserError, match=words):
        check_layout(Flags.of(given), ModelCard.load(worlds(family).base), ranks)


@pytest.mark.slow
def test_a_run_of_local_layers_is_not_resumed_with_the_engines(
    train: Train, worlds: Worlds
) -> None:
    world = worlds("qwen3")
    save = check_ran(train("run", *start_of(world), steps=1, keep=True)).save
    base, card = str(world.base), ModelCard.load(world.base)
    resuming = Flags.of({"save": str(save)})
    find_start_weights(base, card, resuming, engine=False)
    find_start_weights(base, card, Flags(), engine=True)  # an import has what either asks for
    with pytest.raises(
        UserError,
        match="saved by Megatron's local layers .*final_layernorm.* --transformer-impl local",
    ):
        find_start_weights(base, card, resuming, engine=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "card", "parts"),
    [
        (
            "qwen3",
            "llama",
            ["unexpected: ", "k_layernorm.weight", "q_layernorm.weight", "output_layer.weight"],
        ),
        ("mistral", "qwen2", ["missing: decoder.layers.self_attention.linear_qkv.bias)"]),
        (
            "mixtral",
            "mistral",
            ["missing: ", "mlp.linear_fc1.weight", "unexpected: ", "mlp.router.weight"],
        ),
    ],
)
def test_weights_of_another_family(
    train: Train, worlds: Worlds, tmp_path: Path, weights: str, card: str, parts: list[str]
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(worlds(weights).base, mixed)
    shutil.copy(worlds(card).base / CARD_FILE, mixed)
    run = train("run", *start_of(worlds(card)), "--tsft-model", str(mixed))
    assert run.codes == [2] and "Traceback" not in run.logs[0]
    assert all(part in run.error for part in ["does not fit the model", *parts]), run.error
    assert not run.save.exists()  # nothing was written
