"""What a training step costs on GPUs, on paper: counted bytes, messages and products times assumed
hardware."""

from dataclasses import dataclass
from math import ceil, log2

ASSUMED = {  # name: (value, where it comes from)
    "mfu": (
        0.45,
        "share of the bf16 peak that model and teacher reach; Llama 3 (arXiv 2407.21783) 38-43% on"
        " H100",
    ),
    "hbm": (0.85, "share of the HBM peak that streaming kernels reach; our kernels: not measured"),
    "link": (0.75, "share of a link's peak that NCCL reaches with large messages"),
    "operation_us": (3.0, "a small torch operation on a busy GPU: launch and run; not measured"),
    "nvlink_us": (15.0, "a small NCCL collective inside a node; not measured"),
    "network_us": (25.0, "a small NCCL collective over nodes, its start; not measured"),
    "hop_us": (5.0, "the same for each level of a tree over the nodes, up and down; not measured"),
    "sync_us": (100.0, "the host waits for the GPU, then the GPU for the host; not measured"),
    "network_gbs": (
        50.0,
        "GB/s a GPU and direction: InfiniBand NDR, 400 Gb/s, one adapter a GPU; vendor's data"
        " sheet",
    ),
    "node": (8, "GPUs of a node: HGX boards; vendor's data sheet"),
    "gradient_bytes": (4, "a gradient in the reduce-scatter: Megatron's bf16 default sums in fp32"),
    "parameter_bytes": (2, "a parameter in the all-gather: bf16"),
    "state_bytes": (
        12,
        "optimizer state a parameter, over the data-parallel ranks; 6 more stay: Megatron's manual",
    ),
    "sequences": (16, "documents of a micro-batch (iw-sft)"),
}
MEGATRON_REDUCTION = 9  # operations of loss_func in Megatron's pretrain_gpt.py, by hand
CHUNKS, MIN_COLUMNS, ALIGNMENT, CHUNK_OPERATIONS = (
    48,
    256,
    128,
    31,
)  # the fused head: loss/linear_head.py; a chunk's


@dataclass(frozen=True)
class Gpu:
    """Vendor's data sheet, SXM, dense bf16."""

    tflops: float
    hbm_tbs: float
    hbm_gb: float
    nvlink_gbs: float  # one direction


GPUS = {
    "a100": Gpu(312, 2.039, 80, 300),
    "h100": Gpu(989, 3.35, 80, 450),
    "h200": Gpu(989, 4.8, 141, 450),
    "b200": Gpu(2250, 8.0, 180, 900),
}


@dataclass(frozen=True)
class Model:
    """As its published config.json says; `tp` and `pp` are where it usually fits."""

    layers: int
    hidden: int
    ffn: int  # of one expert
    heads: int
    groups: int
    vocabulary: int
    tp: int
    pp: int
    experts: int = 1
    active: int = 1
    ep: int = 1
    head_dim: int = 128

    @property
    def attention(self) -> int:
        """Parameters of a layer's attention."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.groups)

    @property
    def expert(self) -> int:
        return 3 * self.hidden * self.ffn

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        return self.layers * (self.attention + self.experts * self.expert) + 2 * self.head

    @property
    def active_in_layers(self) -> int:
        """Parameters that a token meets, without embedding and head."""
        return self.layers * (self.attention + self.active * self.expert)


MODELS = {
    "llama3-8b": Model(32, 4096, 14336, 32, 8, 128256, tp=2, pp=1),
    "qwen3-32b": Model(64, 5120, 25600, 64, 8, 151936, tp=8, pp=2),
    "llama3-70b": Model(80, 8192, 28672, 64, 8, 128256, tp=8, pp=4),
    "qwen3-235b-a22b": Model(
        94, 4096, 1536, 64, 4, 151936, tp=4, pp=8, experts=128, active=8, ep=8
    ),
}


@dataclass(frozen=True)
class Loss:
    """What is counted of a loss; tests hold these numbers to the code."""

    logit_bytes: int  # HBM bytes a local logit, bf16, forward and backward
    messages: tuple[tuple[str, int], ...]  # over TP: (collective, bytes a token of each rank)
    operations: int  # small torch operations a micro-batch, the loss's reduction included
    logged: int = 7  # values a step, an all-reduce of 8 bytes each over the data-parallel ranks
    token_bytes: int = 0  # HBM bytes a token beside
    block_bytes: int = 0  # and for each 4096 columns
    live_teacher: bool = False

    def bytes(self, columns: int) -> int:
        """Of a token."""
        return (
            self.logit_bytes * columns + self.token_bytes + self.block_bytes * ceil(columns / 4096)
        )


PLAIN = "megatron"
LOSSES = {
    # 8 passes of eager operations over fp32 copies,
    # docs/scaling.md; its messages and 26 operations are counted
    PLAIN: Loss(52, (("all_reduce", 4),) * 3, 26 + MEGATRON_REDUCTION, logged=1),
    # --cross-entropy-loss-fusion, by hand: 4 compiled parts of one pass each, 6 + 8 + 8 + 10 bytes
    "megatron-fused": Loss(
        32, (("all_reduce", 4), ("all_reduce", 8)), 8 + MEGATRON_REDUCTION, logged=1
    ),
    # --cross-entropy-fusion-impl te, by hand from its Triton kernels where they write over the
    # logits: two reads and a write, then times the upstream gradient, a read and a write
    "transformer-engine": Loss(10, (("all_gather", 12),), 10 + MEGATRON_REDUCTION, logged=1),
    "sft": Loss(6, (("all_gather", 16),), 159, token_bytes=44),
    "target-sft-eta0": Loss(6, (("all_gather", 16),), 198, token_bytes=48),
    "gem": Loss(6, (("all_gather", 32),), 238, token_bytes=80),
    "target-sft-topk": Loss(6, (("all_gather", 32),), 294, token_bytes=2632, block_bytes=16),
    "target-sft-dense": Loss(10, (("all_gather", 44),), 259, token_bytes=98, live_teacher=True),
}


@dataclass(frozen=True)
class Run:
    """One training run; times are seconds."""

    model: Model
    gpu: Gpu
    gpus: int
    tp: int
    pp: int
    cp: int
    tokens: int  # of a micro-batch, before context parallelism
    micro_batches: int  # of a data-parallel rank and step
    teacher: Model
    fuse_head: bool
    recompute: bool
    assumed: dict[str, float]

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def n(self) -> int:
        """Tokens of a rank."""
        return self.tokens // self.cp

    @property
    def columns(self) -> int:
        return ceil(self.model.vocabulary / self.tp)

    def product(self, parameters: float) -> float:
        """One forward pass of this many parameters over TP."""
        return 2 * parameters * self.n / self.tp / (self.gpu.tflops * 1e12 * self.assumed["mfu"])

    def hbm(self, moved: float) -> float:
        return moved / (self.gpu.hbm_tbs * 1e12 * self.assumed["hbm"])

    def message(self, kind: str, size: float, ranks: int, span: int) -> float:
        """A ring over `ranks` that lie among `span` GPUs side by side; `size` is what each
        brings."""
        if ranks == 1:
            return 0.0
        nodes = ceil(span / self.assumed["node"])
        levels = 0 if kind == "send" else 2 * ceil(log2(nodes))
        start = (
            self.assumed["network_us"] + self.assumed["hop_us"] * levels
            if nodes > 1
            else self.assumed["nvlink_us"]
        )
        speed = self.assumed["network_gbs"] if nodes > 1 else self.gpu.nvlink_gbs
        share = (ranks - 1) / ranks
        sent = {"all_gather": ranks - 1, "all_reduce": 2 * share, "scatter": share, "send": 1}
        return 1e-6 * start + size * sent[kind] / (speed * 1e9 * self.assumed["link"])

    def loss(self, loss: Loss) -> dict[str, float]:
        """Of one micro-batch on a rank of the last stage."""
        operations = loss.operations * self.assumed["operation_us"] * 1e-6
        messages = sum(
            self.message(kind, size * self.n, self.tp, self.tp) for kind, size in loss.messages
        )
        parts = {
            "hbm": self.hbm(loss.bytes(self.columns) * self.n),
            "operations": operations,
            "messages": messages,
        }
        if (
            self.fuse_head and loss.logged > 1
        ):  # ours: the logits once more, hidden's gradient summed chunk by chunk
            step = max(MIN_COLUMNS, ceil(self.columns / (CHUNKS * ALIGNMENT)) * ALIGNMENT)
            chunks = ceil(self.columns / min(step, self.columns))
            parts["operations"] += chunks * CHUNK_OPERATIONS * self.assumed["operation_us"] * 1e-6
            parts["head again"] = self.product(self.model.head) + self.hbm(
                8 * chunks * self.n * self.model.hidden
            )
        return parts

    def teacher_parts(self, loss: Loss) -> dict[str, float]:
        """A live teacher's forward pass, a micro-batch: its layers on each stage, its head on the
        last."""
        if not loss.live_teacher:
            return {"layers": 0.0, "head": 0.0}
        head = self.product(self.teacher.hidden * self.model.vocabulary) * (
            2 if self.fuse_head else 1
        )
        return {"layers": self.product(self.teacher.active_in_layers / self.pp), "head": head}

    def width(self, loss: Loss) -> int:
        """Of what stages send each other, both ways."""
        return self.model.hidden + (self.teacher.hidden if loss.live_teacher else 0)

    def per_rank(self, model: Model) -> tuple[float, float, int]:
        """Parameters of a rank: (dense, experts, the ranks that share the experts')."""
        dense = (
            model.layers * (model.attention + (model.experts == 1) * model.expert) + 2 * model.head
        ) / self.tp
        experts = model.layers * model.experts * model.expert * (model.experts > 1) / model.ep
        return dense / self.pp, experts / self.pp, max(1, self.dp * self.cp * self.tp // model.ep)

    def gradients(self) -> tuple[float, float]:
        """(reduce-scatter, all-gather) of a step over the data-parallel ranks."""
        dense, experts, expert_ranks = self.per_rank(self.model)
        both = []
        for size in (self.assumed["gradient_bytes"], self.assumed["parameter_bytes"]):
            ranks = self.dp * self.cp
            time = self.message("scatter", dense * size, ranks, ranks * self.tp)
            both.append(
                time
                + (
                    self.message("scatter", experts * size, expert_ranks, self.gpus)
                    if experts
                    else 0
                )
            )
        return both[0], both[1]

    def state_gb(self, loss: Loss) -> float:
        """Weights, gradients, optimizer and a live teacher's weights, GB a GPU; activations come on
        top."""
        dense, experts, expert_ranks = self.per_rank(self.model)
        state, fixed = (
            self.assumed["state_bytes"],
            self.assumed["gradient_bytes"] + self.assumed["parameter_bytes"],
        )
        size = dense * (fixed + state / (self.dp * self.cp)) + experts * (
            fixed + state / expert_ranks
        )
        return (size + (sum(self.per_rank(self.teacher)[:2]) * 2 if loss.live_teacher else 0)) / 1e9

    def logging(self, loss: Loss) -> float:
        """The reduction of the logged values, a step."""
        ranks = self.dp * self.cp
        return loss.logged * self.message("all_reduce", 8, ranks, ranks * self.tp)

    def step(self, loss: Loss) -> float:
        """1F1B: every stage once, then the slowest, which is the last, for each further
        micro-batch."""
        forward, teacher = (
            self.product(self.model.active_in_layers / self.pp),
            self.teacher_parts(loss),
        )
        backward = (3 if self.recompute else 2) * forward
        stage = forward + backward + teacher["layers"]
        if (
            self.pp > 1
        ):  # sequence parallel: each TP rank sends its part; once forward, once backward
            send = self.message("send", 2 * self.n * self.width(loss) / self.tp, 2, self.gpus)
            if (
                loss.live_teacher
            ):  # shapes that Megatron does not expect: it sends them first (p2p_communication.py)
                send += self.message("send", 24, 2, self.gpus) + 1e-6 * self.assumed["sync_us"]
            stage += 2 * send
        last = (
            stage
            + 3 * self.product(self.model.head)
            + teacher["head"]
            + sum(self.loss(loss).values())
        )
        scatter, gather = self.gradients()
        exposed = max(0.0, scatter - backward) + max(
            0.0, gather - forward
        )  # Megatron's overlap flags hide the rest
        return (self.pp - 1) * stage + self.micro_batches * last + exposed + self.logging(loss)

    def over_context(self) -> float:
        """iw-sft's one all-reduce more: a sum and a count for each document, a micro-batch."""
        return self.message("all_reduce", 8 * self.assumed["sequences"], self.cp, self.cp * self.tp)
