"""The torch engine: texts packed in one row score as padded ones do, and encoders that cannot be packed are padded."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from bench.tiny import HOLDOUT
from config.settings import ROOT
from model.engine import load_scorer
from model.network import ToxicityNetwork
from model.packed import PACKED_ATTENTION, PackedTexts, packed_attention
from model.text import TOKENIZER_FILE
from model.torch_engine import TorchEngine, first_position, kernel_agrees, load_network, padded_on
from model.version import STARTER_DIRECTORY
from trainer.dataset import read_csv

CPU = torch.device("cpu")
ROUNDING = 1e-5
SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE = SIZES | {"intermediate_size": 64, "max_position_embeddings": 80}

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def distilbert(**changes: int) -> PreTrainedModel:
    sizes = {"vocab_size": 300, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 80}
    return DistilBertModel(DistilBertConfig(**sizes | changes))


# With the position id of a text's first token: RoBERTa counts from behind the id of its padding.
PACKED_ENCODERS: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "BERT": (lambda: BertModel(BertConfig(**SHAPE)), 0),
    "DistilBERT": (distilbert, 0),
    "RoBERTa": (lambda: RobertaModel(RobertaConfig(**SHAPE, pad_token_id=1)), 2),
    "ELECTRA": (lambda: ElectraModel(ElectraConfig(**SHAPE, embedding_size=16)), 0),
}
PADDED_ENCODERS: dict[str, Callable[[], PreTrainedModel]] = {
    # Attention of its own, which no argument reaches.
    "DeBERTa": lambda: DebertaV2Model(DebertaV2Config(**SHAPE, relative_attention=True, pos_att_type=["p2c", "c2p"])),
    # Layers that look at a few neighbours only.
    "ModernBERT": lambda: ModernBertModel(
        ModernBertConfig(**SHAPE, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    ),
}


def network_on(encoder: Callable[[], PreTrainedModel]) -> ToxicityNetwork:
    torch.manual_seed(3)
    return ToxicityNetwork(encoder()).eval()


def random_texts(*lengths: int) -> list[list[int]]:
    return [np.random.default_rng(length).integers(2, 300, length).tolist() for length in lengths]


@torch.inference_mode()
def packed_scores(network: ToxicityNetwork, token_ids: Sequence[Sequence[int]], first: int) -> np.ndarray:
    return network.classify(network.pool_packed(PackedTexts.pack(token_ids, first, CPU))).sigmoid().numpy()


@torch.inference_mode()
def padded_scores(network: ToxicityNetwork, token_ids: Sequence[Sequence[int]]) -> np.ndarray:
    return network.classify(network.pool(*padded_on(CPU, token_ids))).sigmoid().numpy()


def test_packing_puts_texts_in_a_row() -> None:
    packed = PackedTexts.pack([[7, 8, 9], [5], [3, 4]], 2, CPU)
    assert packed.ids.tolist() == [[7, 8, 9, 5, 3, 4]]
    assert packed.positions.tolist() == [[2, 3, 4, 2, 2, 3]]
    assert packed.offsets.tolist() == [0, 3, 4, 6]
    assert packed.longest == 3
    assert (packed.ids.dtype, packed.offsets.dtype) == (torch.int64, torch.int32)


@pytest.mark.parametrize("name", PACKED_ENCODERS)
def test_packed_texts_score_as_padded_ones(name: str) -> None:
    # Given an encoder, and its scores of texts from one token to as many as it reads
    encoder, first = PACKED_ENCODERS[name]
    network, texts = network_on(encoder), random_texts(5, 70, 1, 33, 2, 64)
    expected = padded_scores(network, texts)
    assert np.ptp(expected, axis=0).min() > 10 * ROUNDING
    # When it is found out how to pack them
    assert first_position(network) == first
    # Then the scores are those
    assert np.abs(packed_scores(network, texts, first) - expected).max() < ROUNDING


@pytest.mark.parametrize("name", PADDED_ENCODERS)
def test_what_cannot_be_packed_is_padded(name: str, caplog: pytest.LogCaptureFixture) -> None:
    # Given an encoder that cannot tell packed texts apart
    network, texts = network_on(PADDED_ENCODERS[name]), random_texts(5, 70, 33)
    usual_attention, expected = network.encoder.config._attn_implementation, padded_scores(network, texts)
    # When it is tried
    with caplog.at_level(logging.WARNING, "model.torch_engine"):
        assert first_position(network) is None
    # Then the log says so in one line, and the encoder is as it was
    (said,) = (record.message for record in caplog.records if record.name == "model.torch_engine")
    assert said.startswith(f"{type(network.encoder).__name__} is run with padding: ")
    assert network.encoder.config._attn_implementation == usual_attention
    assert (padded_scores(network, texts) == expected).all()


def test_no_mask_is_built_for_packed_texts() -> None:
    # Given packed texts, of which a mask would have tokens × tokens entries
    network = network_on(distilbert)
    assert first_position(network) == 0
    seen = []
    layer = network.encoder.transformer.layer[0].attention
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    # When they are scored, attention gets none
    packed_scores(network, random_texts(5, 9), 0)
    assert seen == [None]


def test_packed_texts_score_alike_in_every_thread() -> None:
    network, batches = network_on(distilbert), [random_texts(*range(1, 40, step)) for step in range(1, 9)]
    assert first_position(network) == 0
    alone = [packed_scores(network, batch, 0) for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda batch: packed_scores(network, batch, 0), batches))
    assert all((one == other).all() for one, other in zip(alone, together, strict=True))


def test_the_starter_scores_real_comments_packed_as_padded() -> None:
    # Given a hundred real comments
    tokenizer = Tokenizer.from_file(str(STARTER_DIRECTORY / TOKENIZER_FILE))
    tokenizer.enable_truncation(64)
    texts = read_csv(ROOT / "samples" / "comments.csv").texts[:100]
    token_ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    network = load_network(STARTER_DIRECTORY)
    expected = np.concatenate([padded_scores(network, [ids]) for ids in token_ids])
    first = first_position(network)
    assert first == 0
    # Then all of them in one row score as each one alone
    assert np.abs(packed_scores(network, token_ids, first) - expected).max() < ROUNDING


# --- CUDA, as far as it goes without ---


def test_arguments_fit_the_cuda_kernel() -> None:
    # Given a CUDA device that computes shapes and types only, and three texts of eleven tokens
    with FakeTensorMode():
        query = torch.empty(1, 4, 11, 8, dtype=torch.bfloat16, device="cuda")
        offsets = torch.empty(4, dtype=torch.int32, device="cuda")
        # When their attention is computed by the kernel
        output, _ = packed_attention(
            torch.nn.Identity(), query, query, query, None, cu_seq_lens_q=offsets, max_length_q=6
        )
    # Then it is what an encoder's layer takes
    assert (output.shape, output.dtype, output.device.type) == ((1, 11, 4, 8), torch.bfloat16, "cuda")


def test_half_precision_is_told_from_a_wrong_kernel() -> None:
    # Given a packed encoder in bf16
    network = network_on(lambda: distilbert(max_position_embeddings=512))
    usual_attention = network.encoder.config._attn_implementation
    assert first_position(network) == 0
    network.encoder.to(torch.bfloat16)
    # Then its rounding is let pass, and positions one too far are not
    assert kernel_agrees(network, 0, usual_attention)
    assert network.encoder.config._attn_implementation == PACKED_ATTENTION
    assert not kernel_agrees(network, 1, usual_attention)
    assert network.encoder.config._attn_implementation == usual_attention


def test_a_batch_too_large_lets_go_of_what_it_held(tiny_version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(tiny_version, "cpu", 1)

    def fill_memory(*_: object) -> None:
        raise torch.OutOfMemoryError

    # Given a forward pass that finds no memory
    monkeypatch.setattr(engine._network, "pool", fill_memory)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        engine.score([[2, 7, 3]])
    # Then the error holds none of the frames in which tensors live
    assert [entry.name for entry in raised.traceback][-1] == "score"


@needs_cuda
def test_cuda_scores_as_the_reference(tiny_version: Path) -> None:
    texts = [*read_csv(HOLDOUT).texts[:200], "word " * 500]
    on_cuda, reference = (load_scorer(tiny_version, device=device, engine="torch") for device in ("cuda", "cpu"))
    assert "without padding" in on_cuda.engine.description
    assert np.abs(on_cuda.score_texts(texts) - reference.score_texts(texts)).max() < 0.02
