"""A small real version: a random two-layer DistilBERT, trained for a moment and exported by the project's own code.

Its scores mean little, but everything about it is real: tokenizer, weights, int8 form, manifest and hashes.
"""

import json
import shutil
from pathlib import Path
from zlib import crc32

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

from config.settings import ROOT, TrainerSettings, load_settings
from model.version import MANIFEST_FILE
from trainer.assembly import TrainingData
from trainer.dataset import read_csv
from trainer.recipe import WrittenVersion, from_encoder, train_version

TRAIN = ROOT / "samples" / "train.csv"
HOLDOUT = ROOT / "samples" / "holdout.csv"

# With matrices this small, threads would do little but wait for each other.
torch.set_num_threads(1)


def tiny_settings(**overrides: object) -> TrainerSettings:
    """The default trainer settings, small enough for a test."""
    small = {
        "epochs": 1,
        "batch_size": 16,
        "max_length": 64,
        "calibration_texts": 16,
        "learning_rate": 5e-4,
        "checkpoint_steps": 0,
        "report_to": [],
        "robustness_rows": 24,
        # On so few rows a comment more or less in the right order is several times what would be allowed.
        "max_int8_auc_drop": 1.0,
    }
    return load_settings({}).trainer.model_copy(update=small | overrides)


def write_tiny_encoder(directory: Path, *, seed: int = 0) -> Path:
    """A random DistilBERT and its tokenizer, as `from_pretrained` reads them; of one seed always the same."""
    texts = read_csv(TRAIN).texts[:300]
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(texts, vocab_size=1000, show_progress=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
    ).save_pretrained(directory)
    config = DistilBertConfig(
        vocab_size=tokenizer.get_vocab_size(), dim=32, hidden_dim=64, n_layers=2, n_heads=2, max_position_embeddings=64
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        DistilBertModel(config).save_pretrained(directory)
    return directory


def write_tiny_version(versions_dir: Path, version: str, *, rows: int = 96, **overrides: object) -> WrittenVersion:
    """Train and publish a tiny version under `versions_dir`: the same for the same name, another for another."""
    work_dir = versions_dir / f".work-{version}"
    work_dir.mkdir(parents=True)
    try:
        settings = tiny_settings(
            encoder=str(write_tiny_encoder(work_dir / "encoder", seed=crc32(version.encode()))), **overrides
        )
        start = from_encoder(settings, work_dir)
        training, holdout = read_csv(TRAIN).take(range(rows)), read_csv(HOLDOUT).take(range(120))
        written = train_version(
            start,
            TrainingData(training, training.take([]), {"training": training.describe(), "holdout": holdout.describe()}),
            holdout,
            settings,
            version=version,
            directory=versions_dir / version,
            work_dir=work_dir,
            report=lambda progress: None,
            precision="fp16",
        )
        assert written is not None  # this is no torchrun
        return written
    finally:
        shutil.rmtree(work_dir)


def copy_version(directory: Path, versions_dir: Path, version: str) -> Path:
    """The same files as another version under `versions_dir`; its directory."""
    copy = versions_dir / version
    shutil.copytree(directory, copy)
    manifest = copy / MANIFEST_FILE
    facts = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps(facts | {"version": version}), encoding="utf-8")
    return copy
