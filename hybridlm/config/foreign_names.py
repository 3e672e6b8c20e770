"""What the settings of other training programs are called here. docs/from_other_tools.md is this table."""

from __future__ import annotations

from typing import NamedTuple


class Foreign(NamedTuple):
    """ours: a field, a group with its option, or a command; empty: there is none. remark: what else is different."""

    ours: str
    remark: str = ""


OTHERS = "others"  # names that many programs share
_STEPS = "counted in steps of data.global_batch x data.seq_len tokens; `hybridlm plan` shows both"
_NO_DROPOUT = Foreign("", "there is no dropout; leave it out")
_NO_BIAS = Foreign("", "projections of attention and MLPs have no biases; leave it out")
_MUON = "optim.muon.lr for the matrices inside blocks, with the default optim=muon"
_SHARE = "a share of the peak, not a rate"
_WEIGHTS = Foreign("init_from", "a run folder, such as `hybridlm import` makes of a model of another program")

NAMES: dict[str, dict[str, Foreign]] = {
    "nanoGPT": {
        "out_dir": Foreign("hydra.run.dir"),
        "eval_interval": Foreign("trainer.val_every"),
        "log_interval": Foreign("trainer.log_every"),
        "eval_iters": Foreign("trainer.val_batches"),
        "eval_only": Foreign("hybridlm eval RUN"),
        "always_save_checkpoint": Foreign(
            "trainer.ckpt_every", "a checkpoint is written at this interval, whatever the loss"
        ),
        "wandb_log": Foreign("logger=wandb"),
        "wandb_project": Foreign("logger.project"),
        "wandb_run_name": Foreign("logger.run_name"),
        "dataset": Foreign("data=files", "with data.path; or data=openwebtext, or data=bins for a train.bin"),
        "gradient_accumulation_steps": Foreign("trainer.accumulate"),
        "batch_size": Foreign("data.batch_size", "data.global_batch is the batch of a whole step"),
        "block_size": Foreign("data.seq_len"),
        "n_layer": Foreign("model.n_layers"),
        "n_head": Foreign("model.attention.n_heads"),
        "n_embd": Foreign("model.d_model"),
        "dropout": _NO_DROPOUT,
        "bias": _NO_BIAS,
        "learning_rate": Foreign("optim.lr", _MUON),
        "max_iters": Foreign("trainer.max_steps"),
        "weight_decay": Foreign("optim.weight_decay"),
        "beta1": Foreign("optim.betas=[0.9,0.95]", "both betas in one list"),
        "beta2": Foreign("optim.betas=[0.9,0.95]", "both betas in one list"),
        "grad_clip": Foreign("optim.clip", "null, not 0, for none"),
        "decay_lr": Foreign("optim.schedule=constant", "for decay_lr=False"),
        "warmup_iters": Foreign("optim.warmup", "steps, or a share of all below 1"),
        "lr_decay_iters": Foreign("trainer.max_steps", "the schedule ends where the run does"),
        "min_lr": Foreign("optim.final_lr", _SHARE),
        "backend": Foreign("", "NCCL on GPUs and Gloo on CPUs; leave it out"),
        "device": Foreign("hardware=cpu", "or a card; auto takes the GPU if there is one"),
        "dtype": Foreign("trainer.precision"),
        "compile": Foreign("trainer.compile"),
    },
    "nanochat": {
        "run": Foreign("logger.run_name", "with logger=wandb"),
        "device_type": Foreign("hardware=cpu", "or a card; auto takes the GPU if there is one"),
        "fp8": Foreign("trainer.precision", "there is no FP8"),
        "depth": Foreign("size=d20", "--depth=20 is model=transformer size=d20"),
        "aspect_ratio": Foreign("model.d_model", "sizes d12 to d26 have 64 times their depth"),
        "head_dim": Foreign("model.attention.head_dim"),
        "max_seq_len": Foreign("data.seq_len"),
        "window_pattern": Foreign("model.pattern=SSST", "with 'model.variants={S: {mixer: attention, window: 1024}}'"),
        "num_iterations": Foreign("trainer.max_steps"),
        "target_flops": Foreign("trainer.max_steps", _STEPS),
        "target_param_data_ratio": Foreign("trainer.max_steps", _STEPS),
        "device_batch_size": Foreign("data.batch_size"),
        "total_batch_size": Foreign("data.global_batch", "windows, not tokens: divide by data.seq_len"),
        "embedding_lr": Foreign("optim.lr_scale.embedding", "a multiple of optim.lr"),
        "unembedding_lr": Foreign("optim.lr_scale.head", "a multiple of optim.lr"),
        "matrix_lr": Foreign("optim.muon.lr"),
        "scalar_lr": Foreign("optim.lr_scale.vector", "a multiple of optim.lr"),
        "weight_decay": Foreign("optim.weight_decay"),
        "warmup_steps": Foreign("optim.warmup"),
        "warmdown_ratio": Foreign("optim.decay", "with optim.schedule=wsd"),
        "final_lr_frac": Foreign("optim.final_lr"),
        "resume_from_step": Foreign("ckpt=RUN/checkpoints/step-00001000.ckpt", "or ckpt=last"),
        "eval_every": Foreign("trainer.val_every"),
        "eval_tokens": Foreign("trainer.val_batches", "micro-batches, not tokens"),
        "core_metric_every": Foreign("hybridlm eval RUN --tasks hellaswag,arc_easy", "after training"),
        "sample_every": Foreign("callbacks.samples.every", "validations, not steps"),
        "save_every": Foreign("trainer.ckpt_every"),
        "model_tag": Foreign("hydra.run.dir"),
    },
    "litgpt": {
        "model_name": Foreign("model=transformer", "docs/presets.md lists the architectures"),
        "model_config": Foreign("model.d_model", "and the other fields of model, one by one or in an experiment"),
        "out_dir": Foreign("hydra.run.dir"),
        "precision": Foreign("trainer.precision"),
        "initial_checkpoint_dir": _WEIGHTS,
        "resume": Foreign("ckpt=auto", "or last, or a path"),
        "train.save_interval": Foreign("trainer.ckpt_every"),
        "train.log_interval": Foreign("trainer.log_every"),
        "train.global_batch_size": Foreign("data.global_batch"),
        "train.micro_batch_size": Foreign("data.batch_size"),
        "train.lr_warmup_steps": Foreign("optim.warmup"),
        "train.lr_warmup_fraction": Foreign("optim.warmup", "a share of the whole run, not of an epoch"),
        "train.epochs": Foreign("trainer.max_steps", _STEPS),
        "train.max_tokens": Foreign("trainer.max_steps", _STEPS),
        "train.max_steps": Foreign("trainer.max_steps"),
        "train.max_time": Foreign("trainer.time_limit", "90m or 2h, not a number of seconds"),
        "train.max_seq_length": Foreign("data.seq_len"),
        "train.tie_embeddings": Foreign("model.tie_embeddings"),
        "train.max_norm": Foreign("optim.clip"),
        "train.min_lr": Foreign("optim.final_lr", _SHARE),
        "eval.interval": Foreign("trainer.val_every"),
        "eval.max_iters": Foreign("trainer.val_batches"),
        "eval.max_new_tokens": Foreign("callbacks.samples.tokens"),
        "optimizer": Foreign("optim=adamw"),
        "devices": Foreign("trainer.devices"),
        "num_nodes": Foreign("", "srun or torchrun sets the number of nodes (docs/clusters.md)"),
        "tokenizer_dir": Foreign("data.tokenizer.path", "with data.tokenizer.kind=file"),
        "logger_name": Foreign("logger=wandb", "or tensorboard, files"),
    },
    "transformers": {
        "output_dir": Foreign("hydra.run.dir"),
        "per_device_train_batch_size": Foreign("data.batch_size"),
        "max_steps": Foreign("trainer.max_steps"),
        "num_train_epochs": Foreign("trainer.max_steps", _STEPS),
        "warmup_ratio": Foreign("optim.warmup"),
        "lr_scheduler_type": Foreign("optim.schedule"),
        "logging_steps": Foreign("trainer.log_every"),
        "eval_steps": Foreign("trainer.val_every"),
        "save_steps": Foreign("trainer.ckpt_every"),
        "save_total_limit": Foreign("trainer.keep_last"),
        "resume_from_checkpoint": Foreign("ckpt=last", "or a path"),
        "max_grad_norm": Foreign("optim.clip"),
        "bf16": Foreign("trainer.precision=bf16-mixed"),
        "fp16": Foreign("trainer.precision=16-mixed"),
        "gradient_checkpointing": Foreign("trainer.checkpoint_blocks=1", "auto does so where memory requires it"),
        "torch_compile": Foreign("trainer.compile"),
        "report_to": Foreign("logger=wandb", "or tensorboard, files"),
        "hidden_size": Foreign("model.d_model"),
        "num_hidden_layers": Foreign("model.n_layers"),
        "num_attention_heads": Foreign("model.attention.n_heads"),
        "num_key_value_heads": Foreign("model.attention.n_kv_heads"),
        "intermediate_size": Foreign("model.mlp.d_ff"),
        "max_position_embeddings": Foreign("data.seq_len"),
    },
    OTHERS: {
        "lr": Foreign("optim.lr", _MUON),
        "config": Foreign("experiments=NAME", "a YAML file in experiments/, or below another folder with --config-dir"),
        "epochs": Foreign("trainer.max_steps", _STEPS),
        "steps": Foreign("trainer.max_steps"),
        "layers": Foreign("model.n_layers"),
        "num_layers": Foreign("model.n_layers"),
        "heads": Foreign("model.attention.n_heads"),
        "num_heads": Foreign("model.attention.n_heads"),
        "context_length": Foreign("data.seq_len"),
        "vocab_size": Foreign("data.tokenizer.vocab_size"),
        "gpus": Foreign("trainer.devices"),
        "output": Foreign("hydra.run.dir"),
    },
}


def foreign(name: str) -> str | None:
    """What corresponds to a setting of another program (dotted or not, with dashes or underscores), in words. None: no
    program in ``NAMES`` has it."""
    plain = name.replace("-", "_").lower()
    for wanted in dict.fromkeys((plain, plain.rpartition(".")[2])):
        for tool, names in NAMES.items():
            found = names.get(wanted)
            if found is not None:
                whose = wanted if tool == OTHERS else f"{tool}'s {wanted}"
                remark = f" ({found.remark})" if found.ours and found.remark else found.remark
                return f"{whose} is {found.ours} here{remark}" if found.ours else remark
    return None
