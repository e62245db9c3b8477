"""How a decision came about, as one JSON object of stable keys: docs/explain.md has each. Pure."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from config.names import LABELS
from db.explain import Facts


def explanation(submission_id: str, facts: Facts) -> dict[str, Any]:
    """The facts in JSON types, times in ISO 8601; the comment's text and a dead letter's payload are left out."""
    submission, decision, letter = facts.submission, facts.decision, facts.dead_letter
    newest_review = facts.reviews[-1] if facts.reviews else None
    known: Mapping[str, Any] = submission or {}
    return {
        "submission_id": submission_id,
        "state": "dead" if submission is None else submission["state"],
        "community": known.get("community", letter and letter.community),
        "comment_id": known.get("comment_id", letter and letter.comment_id),
        "author": known.get("author", letter and letter.author),
        "action": decision and (newest_review or decision)["action"],
        "decided_by": decision and (newest_review["reviewer"] if newest_review else "model"),
        "decision": decision and _decision(decision),
        "way": _way(known, decision, facts),
        "text": _text(known, facts),
        "policy": _policy(facts),
        "version": decision and _version(decision["model_version"], facts),
        "reviews": [_review(review) for review in facts.reviews],
        "other_versions": [_opinion(scores) for scores in facts.trial_scores],
        "dead_letter": letter
        and {
            "reason": letter.reason,
            "detail": letter.detail,
            "queue": letter.queue,
            "payload_bytes": letter.payload_bytes,
            "received_at": _time(letter.received_at),
        },
    }


def _decision(decision: Mapping[str, Any]) -> dict[str, Any]:
    label, rule = decision["fired_label"], None
    if label is not None:
        threshold, action = decision["fired_threshold"], decision["action"]
        rule = {"label": label, "score": decision[label], "threshold": threshold, "action": action}
    return {
        "action": decision["action"],
        "scores": _scores(decision),
        "rule": rule,
        "windows": decision["windows"],
        "truncated": decision["truncated"],
        "decided_at": _time(decision["decided_at"]),
        "position": decision["position"],
    }


def _way(submission: Mapping[str, Any], decision: Mapping[str, Any] | None, facts: Facts) -> dict[str, Any]:
    trial = facts.trial
    return {
        "created_at": _time(submission.get("created_at")),
        "submitted_at": _time(submission.get("submitted_at")),
        # Of a submission that was not durable only its message knew the queue.
        "queue": submission.get("queue"),
        "enqueued_at": _time(submission.get("enqueued_at")),
        "expires_at": _time(submission.get("expires_at")),
        "queue_ms": decision and decision["queue_ms"],
        "compute_ms": decision and decision["compute_ms"],
        "trial": trial
        and {"trial_id": trial.trial_id, "kind": trial.kind, "share": trial.share, "baseline": trial.baseline},
    }


def _text(submission: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    erasure = facts.erasure
    return {
        "stored": submission.get("text") is not None,
        "sha256": submission.get("text_sha256", facts.dead_letter and facts.dead_letter.text_sha256),
        "erased_at": _time(submission.get("erased_at")),
        "erasure": erasure
        and {"kind": erasure["kind"], "erased_by": erasure["erased_by"], "reason": erasure["reason"]},
    }


def _policy(facts: Facts) -> dict[str, Any] | None:
    policy = facts.policy
    return (
        None
        if policy is None
        else {
            "version": policy.policy_version,
            "text": policy.text,
            "first_used_at": _time(policy.first_used_at),
            "activation": _activation(facts.policy_activation),
        }
    )


def _version(name: str, facts: Facts) -> dict[str, Any]:
    manifest = facts.version.manifest if facts.version else {}
    metrics = manifest.get("metrics", {})
    # Of the form that ships, where it was measured.
    held_out = metrics.get("holdout_int8") or metrics.get("holdout_fp32") or {}
    by_label = held_out.get("labels", {})
    return {
        "version": name,
        "parent": manifest.get("parent"),
        "created_at": manifest.get("created_at"),
        "max_length": manifest.get("max_length"),
        "calibrated": bool(manifest.get("calibration")),
        "held_out": {
            "rows": held_out.get("rows"),
            "mean_roc_auc": held_out.get("mean_roc_auc"),
            "roc_auc": {label: by_label.get(label, {}).get("roc_auc") for label in LABELS},
        },
        "activation": _activation(facts.version_activation),
    }


def _activation(activation: Any) -> dict[str, Any] | None:
    return activation and {
        "activated_at": _time(activation.activated_at),
        "activated_by": activation.activated_by,
        "reason": activation.reason,
    }


def _review(review: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "review_id": review["review_id"],
        "action": review["action"],
        "labels": {label: review[label] for label in LABELS if review[label] is not None},
        "reviewer": review["reviewer"],
        "note": review["note"],
        "reviewed_at": _time(review["reviewed_at"]),
    }


def _opinion(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "trial_id": scores["trial_id"],
        "kind": scores["kind"],
        "version": scores["version"],
        "action": scores["action"],
        "scores": None if scores["action"] is None else _scores(scores),
        "error": scores["error"],
        "scored_at": _time(scores["scored_at"]),
    }


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    return {label: row[label] for label in LABELS}


def _time(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()
