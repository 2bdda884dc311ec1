"""What finetune, distill and evaluate refuse: one line, exit code 2, nothing written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file, save_file
from tiny import WORDS, make_tokenizer, tiny_config
from transformers import BartConfig, BartForSequenceClassification, BertForSequenceClassification
from transformers.utils.import_utils import is_bitsandbytes_available, is_galore_torch_available

from codir_fast.cli import main
from codir_fast.distillation.manifest import write_manifest

BASE = {
    "finetune": {
        "--model_name_or_path": "FOLDER/teacher",
        "--train_file": "FOLDER/train.csv",
        "--output_dir": "out",
    },
    "distill": {
        "--teacher": "FOLDER/teacher",
        "--student_layers": "2",
        "--train_file": "FOLDER/train.csv",
        "--output_dir": "out",
    },
    "evaluate": {
        "--model_name_or_path": "FOLDER/teacher",
        "--test_file": "FOLDER/validation.csv",
        "--device": "cpu",
    },
}
VALIDATION = {"--validation_file": "FOLDER/validation.csv"}

# File -> message, as the training file of finetune and distill and the test file of evaluate.
FILES = {
    "nowhere.csv": "must be an existing file",
    "folder.csv": "must be an existing file",
    "dangling.csv": "must be an existing file",
    "teacher/config.xml": "must end in .csv, .json, .jsonl, .parquet, got",
    "unreadable.csv": "can't be read as csv",  # opens, but no byte of it can be read
    "binary.csv": "can't be read as csv",
    "nothing.csv": "has no rows, the file",
    "nothing.json": "has no rows, the file",
    "nothing.jsonl": "has no rows, the file",
    "no-row.json": "has no rows,",
    "none.csv": "has no rows,",
    "ragged.csv": "can't be read as csv",
    "open-quote.csv": "can't be read as csv",
    "latin-1.csv": "can't be read as csv",
    "utf-16.csv": "can't be read as csv",
    "cut.jsonl": "can't be read as jsonl",
    "number.json": "can't be read as json",
    "garbled.parquet": "can't be read as parquet",
    "no-header.csv": "has no column 'text' (`text_column`), its columns are ['w1', 'positive']",
    "semicolons.csv": "has no column 'text' (`text_column`), its columns are ['text;label']",
    "twice.csv": "must have one column of a name,",
    "hole.csv": "must hold texts, row 0",
    "no-label.csv": "must have a label in each row, row 1 has none",
    "list.jsonl": "must hold texts or numbers as labels, row 0: ['positive']",
    "mixed.jsonl": "must hold labels of one kind, row 0 has 'positive' and row 1 has 1",
}

# Flags of TrainingArguments, for finetune and distill.
TRAINING = {
    "text for steps": ({"--max_steps": "many"}, "--max_steps"),
    "no steps": ({"--max_steps": "0"}, "`max_steps` must be in [1, 1000000000], or -1 for none"),
    "negative steps": ({"--max_steps": "-5"}, "`max_steps` must be in [1"),
    "negative epochs": ({"--num_train_epochs": "-1"}, "`num_train_epochs` must be in [0"),
    "negative rate": ({"--learning_rate": "-1"}, "`learning_rate` must be in [0"),
    "rate nan": ({"--learning_rate": "nan"}, "`learning_rate` must be in [0"),
    "infinite decay": ({"--weight_decay": "inf"}, "`weight_decay` must be in [0"),
    "beta of 1": ({"--adam_beta1": "1"}, "`adam_beta1` must be in [0, 0.999999]"),
    "negative norm": ({"--max_grad_norm": "-1"}, "`max_grad_norm` must be in [0"),
    "empty batch": (
        {"--per_device_train_batch_size": "0"},
        "`per_device_train_batch_size` must be in [1",
    ),
    "empty evaluation batch": (
        {"--per_device_eval_batch_size": "0"},
        "`per_device_eval_batch_size` must be in [1",
    ),
    "no accumulation": (
        {"--gradient_accumulation_steps": "0"},
        "`gradient_accumulation_steps` must be in [1",
    ),
    "negative seed": ({"--seed": "-1"}, "`seed` must be in [0, 4294967295]"),
    "text for a seed": ({"--seed": "text"}, "--seed"),
    "negative data seed": ({"--data_seed": "-1"}, "`data_seed` must be in [0, 4294967295]"),
    "negative warm-up": ({"--warmup_steps": "-1"}, "warmup_steps"),
    "warm-up nan": ({"--warmup_steps": "nan"}, "`warmup_steps` must be in [0"),
    "broken warm-up": ({"--warmup_steps": "1.5"}, "`warmup_steps` must be a share of the steps"),
    "negative noise": ({"--neftune_noise_alpha": "-1"}, "`neftune_noise_alpha` must be in [0"),
    "noise nan": ({"--neftune_noise_alpha": "nan"}, "`neftune_noise_alpha` must be in [0"),
    "negative smoothing": ({"--label_smoothing_factor": "-1"}, "`label_smoothing_factor`"),
    "negative save steps": ({"--save_steps": "-5"}, "`save_steps` must be in [1e-09"),
    "save steps 0": (
        {"--save_steps": "0", "--save_strategy": "steps"},
        "`save_steps` must be in [1e-09",
    ),
    "save steps nan": ({"--save_steps": "nan"}, "`save_steps` must be in [1e-09"),
    "broken save steps": ({"--save_steps": "1.5", "--save_strategy": "steps"}, "--save_steps"),
    "negative log steps": ({"--logging_steps": "-5"}, "`logging_steps` must be in [1e-09"),
    "no checkpoint kept": ({"--save_total_limit": "0"}, "`save_total_limit` must be in [1"),
    "unknown save strategy": ({"--save_strategy": "often"}, "--save_strategy"),
    "unknown scheduler": ({"--lr_scheduler_type": "zigzag"}, "--lr_scheduler_type"),
    "scheduler without its setting": (
        {"--lr_scheduler_type": "cosine_with_min_lr"},
        "`lr_scheduler_type` cosine_with_min_lr can't be used: One of min_lr",
    ),
    "scheduler without its steps": (
        {"--lr_scheduler_type": "warmup_stable_decay"},
        "`lr_scheduler_type` warmup_stable_decay can't be used",
    ),
    "scheduler that ends above its start": (
        {"--lr_scheduler_type": "polynomial", "--learning_rate": "0"},
        "`lr_scheduler_type` polynomial can't be used: lr_end",
    ),
    "unknown scheduler setting": (
        {"--lr_scheduler_kwargs": '{"speed": 1}'},
        "`lr_scheduler_type` linear can't be used",
    ),
    "scheduler settings no JSON": ({"--lr_scheduler_kwargs": "fast"}, "must be JSON"),
    "scheduler settings half JSON": ({"--lr_scheduler_kwargs": "{fast"}, "error: "),
    "plateau without evaluation": (
        {"--lr_scheduler_type": "reduce_lr_on_plateau"},
        "reduce_lr_on_plateau requires an eval strategy",
    ),
    "unknown optimizer": ({"--optim": "sgdd"}, "--optim"),
    "optimizer arguments no pairs": (
        {"--optim": "sgd", "--optim_args": "momentum"},
        "`optim` sgd can't be used",
    ),
    "optimizer arguments no number": (
        {"--optim": "sgd", "--optim_args": "momentum=much"},
        "`optim` sgd can't be used",
    ),
    "ignored optimizer arguments": (
        {"--optim": "adamw_torch", "--optim_args": "momentum=0.9"},
        "`optim_args` momentum=0.9 is nothing that `optim` adamw_torch looks at",
    ),
    "both half precisions": ({"--bf16": "True", "--fp16": "True"}, "At most one of fp16 and bf16"),
    "half precision evaluation": ({"--fp16_full_eval": "True"}, "`fp16_full_eval` can't be used"),
    "bfloat16 evaluation": ({"--bf16_full_eval": "True"}, "`bf16_full_eval` can't be used"),
    "evaluation steps alone": (
        {"--eval_steps": "5"},
        "`eval_steps` needs `eval_strategy` steps",
    ),
    "evaluation steps with epochs": (
        VALIDATION | {"--eval_steps": "5", "--eval_strategy": "epoch"},
        "`eval_steps` needs `eval_strategy` steps",
    ),
    "negative evaluation steps": (
        VALIDATION | {"--eval_steps": "-3", "--eval_strategy": "steps"},
        "`eval_steps` must be in [1e-09",
    ),
    "nothing to evaluate on": (
        {"--eval_strategy": "epoch"},
        "`eval_strategy` epoch needs `validation_file` or `validation_split`",
    ),
    "nothing to evaluate on at the start": (
        {"--eval_on_start": "True"},
        "`eval_on_start` needs `validation_file` or `validation_split`",
    ),
    "negative delay": (VALIDATION | {"--eval_delay": "-1"}, "`eval_delay` must be in [0"),
    "no accumulation of evaluation": (
        VALIDATION | {"--eval_accumulation_steps": "0"},
        "`eval_accumulation_steps` must be in [1",
    ),
    "best model of no evaluation": (
        {"--load_best_model_at_end": "True", "--save_strategy": "no"},
        "`load_best_model_at_end` needs `eval_strategy` epoch or steps",
    ),
    "best model of other steps": (
        VALIDATION | {"--load_best_model_at_end": "True", "--eval_strategy": "steps"},
        "--load_best_model_at_end requires the save and eval strategy to match",
    ),
    "metric of no evaluation": (
        {"--metric_for_best_model": "accuracy"},
        "`metric_for_best_model` needs `eval_strategy` epoch or steps",
    ),
    "unknown metric": (
        VALIDATION | {"--load_best_model_at_end": "True", "--metric_for_best_model": "beauty"},
        "`metric_for_best_model` must be one of",
    ),
    "metric of regression": (
        VALIDATION | {"--metric_for_best_model": "pearson"},
        "`metric_for_best_model` must be one of loss, accuracy, got 'pearson'",
    ),
    "greater without a metric": (
        VALIDATION | {"--greater_is_better": "True"},
        "`greater_is_better` needs `metric_for_best_model`",
    ),
    "unknown tracker": ({"--report_to": "diary"}, "`report_to`"),
    "tracker that is not installed": ({"--report_to": "swanlab"}, "`report_to`"),
    "other labels": ({"--label_names": "y"}, "`label_names` can't be used"),
    "prediction": ({"--do_predict": "True"}, "`do_predict` can't be used"),
    "deepspeed": ({"--deepspeed": "zero.json"}, "deepspeed"),
    "fsdp in one process": ({"--fsdp": "full_shard"}, "`fsdp` needs several processes"),
    "fsdp settings alone": ({"--fsdp_config": "x.json"}, "`fsdp_config` needs `fsdp`"),
    "kernels that are not installed": (
        {"--use_liger_kernel": "True"},
        "`use_liger_kernel` can't be used",
    ),
    "hub without network": ({"--push_to_hub": "True"}, "`push_to_hub` True can't be used"),
    "hub model alone": ({"--hub_model_id": "me/mine"}, "`hub_model_id` needs `push_to_hub`"),
    "unknown compiler": (
        {"--torch_compile_backend": "magic"},
        "`torch_compile_backend` magic can't be used",
    ),
    "unknown mode of compilation": (
        {"--torch_compile_mode": "magic"},
        "`torch_compile_mode` magic can't be used: Unrecognized mode",
    ),
    "unknown argument of checkpointing": (
        {
            "--activation_checkpointing": "True",
            "--activation_checkpointing_kwargs": '{"magic": true}',
        },
        "can't be used: Unexpected keyword arguments: magic",
    ),
    "checkpointing settings no JSON": (
        {"--activation_checkpointing": "True", "--activation_checkpointing_kwargs": "fast"},
        "`activation_checkpointing_kwargs` must be JSON",
    ),
    "arguments of no checkpointing": (
        {"--activation_checkpointing_kwargs": '{"use_reentrant": true}'},
        "`activation_checkpointing_kwargs` needs `activation_checkpointing`",
    ),
    "accelerator settings nowhere": ({"--accelerator_config": "nowhere.json"}, "nowhere.json"),
    "unknown accelerator setting": ({"--accelerator_config": '{"magic": 1}'}, "'magic'"),
    "too many workers": (
        {"--dataloader_num_workers": "100000"},
        "`dataloader_num_workers` must be in [0, 1024]",
    ),
    "workers that stay": (
        {"--dataloader_persistent_workers": "True"},
        "`dataloader_persistent_workers` needs workers",
    ),
    "prefetch without workers": (
        {"--dataloader_prefetch_factor": "2"},
        "--dataloader_prefetch_factor",
    ),
    "no whole batch": (
        {"--dataloader_drop_last": "True", "--per_device_train_batch_size": "64"},
        "`dataloader_drop_last` leaves nothing of 48 examples in batches of 64",
    ),
    "unknown order": ({"--train_sampling_strategy": "alphabet"}, "--train_sampling_strategy"),
    "unknown truth": ({"--bf16": "maybe"}, "--bf16"),
    "unknown debug option": ({"--debug": "everything"}, "--debug"),
    "unknown flag": ({"--learning_speed": "1"}, "no flag --learning_speed"),
    "no output": ({"--output_dir": None}, "`output_dir` must be given"),
    "empty output": ({"--output_dir": ""}, "`output_dir` must be given"),
    "output is a file": ({"--output_dir": "FOLDER/train.csv"}, "`output_dir` must be a folder"),
    "output below a file": (
        {"--output_dir": "FOLDER/train.csv/x"},
        "`output_dir` must be a folder",
    ),
    "output is a device": ({"--output_dir": "/dev/null"}, "`output_dir` must be a folder"),
    "output in the kernel": ({"--output_dir": "/proc/out"}, "`output_dir` must be a folder"),
    "output too long": ({"--output_dir": "o" * 300}, "`output_dir` must be a folder"),
    "output with a zero": ({"--output_dir": "o\0t"}, "`output_dir` must be a folder"),
    "output is used, not resumed": (
        {"--output_dir": "FOLDER/teacher", "--resume_from_checkpoint": "False"},
        "`output_dir` must be empty",
    ),
    "output is used": ({"--output_dir": "FOLDER/teacher"}, "`output_dir` must be empty"),
    "no checkpoint": ({"--resume_from_checkpoint": "True"}, "found no checkpoint"),
    "no checkpoint at all": (
        {"--resume_from_checkpoint": "FOLDER/teacher"},
        "`resume_from_checkpoint` must be the folder of a checkpoint",
    ),
}

# Flags of TrainingArguments that have no effect, for finetune and distill.
IGNORED = {
    "no training": ({"--do_train": "False"}, "`do_train` False can't be used: the command trains"),
    "no training, in short": ({"--do-train": "0"}, "`do_train` False can't be used"),
    "no evaluation": (
        VALIDATION | {"--do_eval": "False"},
        "`do_eval` False can't be used: a run evaluates where",
    ),
    "no evaluation of a split": (
        {"--validation_split": "0.5", "--do_eval": "no", "--eval_strategy": "no"},
        "`do_eval` False can't be used: a run evaluates where",
    ),
    "evaluation on nothing": (
        {"--do_eval": "True"},
        "`do_eval` needs `validation_file` or `validation_split`",
    ),
    "state of callbacks": (
        {"--restore_callback_states_from_checkpoint": "False"},
        "`restore_callback_states_from_checkpoint` False can't be used",
    ),
    "column of lengths": (
        {"--length_column_name": "tokens"},
        "`length_column_name` can't be used",
    ),
    "cache of a decoder": ({"--use_cache": "True"}, "`use_cache` can't be used"),
    "inputs for metrics": ({"--include_for_metrics": "inputs"}, "`include_for_metrics` can't be"),
    "late evaluation": ({"--eval_delay": "2"}, "`eval_delay` needs `eval_strategy` epoch or steps"),
    "loss of no evaluation": (
        {"--prediction_loss_only": "True"},
        "`prediction_loss_only` needs `validation_file` or `validation_split`",
    ),
    "pieces of no evaluation": (
        {"--eval_accumulation_steps": "2"},
        "`eval_accumulation_steps` needs `validation_file`",
    ),
    "batches of no evaluation": (
        {"--eval_do_concat_batches": "False"},
        "`eval_do_concat_batches` needs `validation_file`",
    ),
    "no evaluation by batches": (
        {"--batch_eval_metrics": "True"},
        "`batch_eval_metrics` needs `validation_file`",
    ),
    "save steps with epochs": ({"--save_steps": "5"}, "`save_steps` needs `save_strategy` steps"),
    "default save steps with epochs": (
        {"--save_steps": "500"},
        "`save_steps` needs `save_strategy` steps",
    ),
    "number of no checkpoints": (
        {"--save_strategy": "no", "--save_total_limit": "3"},
        "`save_total_limit` needs a `save_strategy` other than no",
    ),
    "weights of no checkpoints": (
        {"--save_strategy": "no", "--save_only_model": "True"},
        "`save_only_model` needs a `save_strategy` other than no",
    ),
    "data of no run before": (
        {"--ignore_data_skip": "True"},
        "`ignore_data_skip` needs `resume_from_checkpoint`",
    ),
    "log steps with epochs": (
        {"--logging_strategy": "epoch", "--logging_steps": "5"},
        "`logging_steps` needs `logging_strategy` steps",
    ),
    "name of no tracker": ({"--run_name": "x"}, "`run_name` needs `report_to` with one of wandb"),
    "project of no tracker": ({"--project": "x"}, "`project` needs `report_to` trackio"),
    "warm-up of a constant": (
        {"--warmup_steps": "3", "--lr_scheduler_type": "constant"},
        "`warmup_steps` needs another `lr_scheduler_type` than constant",
    ),
    "settings of a constant": (
        {"--lr_scheduler_kwargs": '{"a": 1}', "--lr_scheduler_type": "constant_with_warmup"},
        "`lr_scheduler_kwargs` needs another `lr_scheduler_type` than constant_with_warmup",
    ),
    "modules of an optimizer": (
        {"--optim_target_modules": "all-linear"},
        "`optim_target_modules` needs an `optim` of galore or apollo",
    ),
    "seed of a fixed order": (
        {"--data_seed": "1", "--train_sampling_strategy": "sequential"},
        "`data_seed` needs an order that it draws",
    ),
    "memory of no accelerator": (
        {"--torch_empty_cache_steps": "2"},
        "`torch_empty_cache_steps` needs an accelerator",
    ),
    "metrics of a TPU": ({"--debug": "tpu_metrics_debug"}, "`debug` can't be used"),
    "search for overflow": ({"--debug": "underflow_overflow"}, "`debug` can't be used"),
    "start of no workers": (
        {"--dataloader_multiprocessing_context": "spawn"},
        "`dataloader_multiprocessing_context` needs workers",
    ),
    "order of no workers": (
        {"--dataloader_in_order": "False"},
        "`dataloader_in_order` needs workers",
    ),
    **{
        f"{name} of sgd": (
            {"--optim": "sgd", f"--adam_{name}": value},
            f"`adam_{name}` {value} is nothing that `optim` sgd looks at",
        )
        for name, value in (("beta1", "0.5"), ("beta2", "0.5"), ("epsilon", "0.001"))
    },
    **{
        f"{name} without a push": ({f"--hub_{name}": value}, f"`hub_{name}` needs `push_to_hub`")
        for name, value in (
            ("token", "x"),
            ("private_repo", "True"),
            ("strategy", "end"),
            ("always_push", "True"),
            ("revision", "main"),
        )
    },
    **{
        f"{name} without trackio": (
            {f"--trackio_{name}_id": "x"},
            f"`trackio_{name}_id` needs `report_to` trackio",
        )
        for name in ("space", "bucket", "static_space")
    },
    **{
        f"{name} of one process": ({f"--{name}": value}, f"`{name}` needs several processes")
        for name, value in (
            ("ddp_find_unused_parameters", "False"),
            ("ddp_bucket_cap_mb", "10"),
            ("ddp_broadcast_buffers", "True"),
            ("ddp_static_graph", "True"),
            ("ddp_timeout", "100"),
            ("average_tokens_across_devices", "False"),
            ("eval_use_gather_object", "True"),
            ("log_level_replica", "error"),
            ("log_on_each_node", "False"),
            ("save_on_each_node", "True"),
        )
    },
}
# Flags of the data, for finetune and distill.
DATA = {
    "two to evaluate on": (
        VALIDATION | {"--validation_split": "0.3"},
        "`validation_split` can't be given beside `validation_file`",
    ),
    "row of no class": (
        {"--train_file": "FOLDER/unlabelled.parquet"},
        "`train_file` row 1 has the label '-1', which the model does not know",
    ),
    "accuracy of no outputs": (
        VALIDATION
        | {"--prediction_loss_only": "True", "--load_best_model_at_end": "True"}
        | {"--metric_for_best_model": "accuracy"},
        "`metric_for_best_model` must be one of loss, got 'accuracy'",
    ),
    "saved in mid-step": (
        {"--enable_jit_checkpoint": "True"},
        "`enable_jit_checkpoint` can't be used: it saves in the middle of a step",
    ),
    "no train file": ({"--train_file": None}, "exactly one of `train_file` and `dataset_name`"),
    "two sources": ({"--dataset_name": "glue"}, "exactly one of `train_file` and `dataset_name`"),
    "missing validation file": ({"--validation_file": "no.csv"}, "`validation_file` must be an"),
    "unknown label to validate": (
        {"--validation_file": "FOLDER/strange.csv"},
        "`validation_file` row 1 has the label 'neutral', which the model does not know",
    ),
    "floats to validate": (
        {"--validation_file": "FOLDER/scores.csv"},
        "`validation_file` must hold integers or texts as labels, for the model is one of classes",
    ),
    "no such label column": ({"--label_column": "y"}, "`train_file` has no column 'y'"),
    "no such pair": ({"--text_pair_column": "b"}, "has no column 'b' (`text_pair_column`)"),
    "a text with itself": ({"--text_pair_column": "text"}, "`text_pair_column` must not be the"),
    "a text with its label": (
        {"--text_pair_column": "label"},
        "`label_column` must not be the `text_pair_column`",
    ),
    "pair of numbers": (
        {"--train_file": "FOLDER/pairs.csv", "--text_pair_column": "number"},
        "`train_file` must hold texts, row 0 has 1",
    ),
    "one column": ({"--text_column": "label"}, "`label_column` must not be the `text_column`"),
    "bad split": ({"--validation_split": "1.5"}, "`validation_split` must be in [0, 1)"),
    "split nan": ({"--validation_split": "nan"}, "`validation_split` must be in [0, 1)"),
    "nothing left": ({"--validation_split": "0.999"}, "`validation_split` 0.999 of 48 examples"),
    "no samples": ({"--max_train_samples": "0"}, "`max_train_samples` must be at least 1"),
    "one class": ({"--train_file": "FOLDER/one-class.csv"}, "at least 2"),
    "no length": ({"--max_seq_length": "0"}, "`max_seq_length` must be at least 1"),
    "no room": ({"--max_seq_length": "2"}, "`max_seq_length` must be more than the 2 tokens"),
    "too long": ({"--max_seq_length": "100"}, "`max_seq_length` must be at most 32"),
    "much too long": ({"--max_seq_length": "1" + 30 * "0"}, "`max_seq_length` must be at most 32"),
}

FINETUNE = {
    "weights of other sizes": (
        {"--model_name_or_path": "FOLDER/resized"},
        "`model_name_or_path` must hold the weights of its layers,",
    ),
    "weights of another model": (
        {"--model_name_or_path": "FOLDER/foreign"},
        "or none, of bert.embeddings.LayerNorm.bias, bert.embeddings.LayerNorm.weight, bert.",
    ),
    "one named class": (
        {"--train_file": "FOLDER/one-name.parquet"},
        "`train_file` must hold at least 2 different labels, got ['positive']",
    ),
    "no model": ({"--model_name_or_path": "FOLDER/empty"}, "`model_name_or_path` must be a model"),
    "no folder": (
        {"--model_name_or_path": "./no"},
        "`model_name_or_path` must be a model's folder",
    ),
    "no tokenizer": ({"--model_name_or_path": "FOLDER/mute"}, "must have a tokenizer"),
    "no pad token": (
        {"--model_name_or_path": "FOLDER/padless"},
        "`model_name_or_path` must have a tokenizer with a pad token",
    ),
    "pickled weights": ({"--model_name_or_path": "FOLDER/pickle"}, "no file named model.safe"),
    "encoder and decoder": ({"--model_name_or_path": "FOLDER/bart"}, "must be an encoder"),
    "unknown problem": ({"--problem_type": "ranking"}, "`problem_type` must be regression or"),
    "regression of texts": (
        {"--problem_type": "regression"},
        "`train_file` must hold numbers as labels, for the model is one of regression; row 0",
    ),
    "regression of truths": (
        {"--problem_type": "regression", "--train_file": "FOLDER/truths.csv"},
        "`train_file` must hold numbers as labels",
    ),
    "classes of floats": (
        {"--problem_type": "single_label_classification", "--train_file": "FOLDER/scores.csv"},
        "`train_file` must hold integers or texts as labels, for the model is one of classes; row "
        "0 has 0.5",
    ),
    "infinite score": (
        {"--train_file": "FOLDER/infinite.csv"},
        "`train_file` must hold finite labels, row 2 has inf",
    ),
    "score nan": (
        {"--train_file": "FOLDER/nan.parquet"},
        "`train_file` must hold finite labels, row 1 has nan",
    ),
    "score beyond float32": (
        {"--train_file": "FOLDER/huge.csv"},
        "`train_file` must hold finite labels, row 1 has 1e+39",
    ),
    "missing score": (
        {"--train_file": "FOLDER/missing-score.csv"},
        "`train_file` must have a label in each row, row 1 has none",
    ),
    "integer of no class": (
        {"--train_file": "FOLDER/ranks.csv", "--validation_file": "FOLDER/rank-0.csv"},
        "`validation_file` row 0 has the label '0', which the model does not know; it knows "
        "['1', '2', '3']",
    ),
    "accuracy of regression": (
        {
            "--train_file": "FOLDER/scores.csv",
            "--validation_file": "FOLDER/scores.csv",
            "--metric_for_best_model": "accuracy",
        },
        "`metric_for_best_model` must be one of loss, mse, pearson, spearman, got 'accuracy'",
    ),
    "smoothed scores": (
        {"--train_file": "FOLDER/scores.csv", "--label_smoothing_factor": "0.1"},
        "`label_smoothing_factor` has no meaning in regression",
    ),
}

DISTILL = {
    "temperature of nothing": (
        {"--codir_weight": "0", "--temperature": "0.5"},
        "`temperature` needs `codir_weight` > 0",
    ),
    "switch of nothing": (
        {"--codir_weight": "0", "--both_sides": "True"},
        "`both_sides` needs `codir_weight` > 0",
    ),
    "pooling of nothing": (
        {"--codir_weight": "0", "--pooling": "max"},
        "`pooling` needs `codir_weight` > 0 or `pkd_weight` > 0",
    ),
    "kd temperature of nothing": (
        {"--kd_weight": "0", "--kd_temperature": "9"},
        "`kd_temperature` needs `kd_weight` > 0",
    ),
    "a student of other sizes": (
        {"--student_layers": None, "--student": "FOLDER/resized"},
        "`student` must hold the weights of its layers,",
    ),
    "a student of other weights": (
        {"--student_layers": None, "--student": "FOLDER/foreign"},
        "`student` must hold the weights of its layers,",
    ),
    "no model": ({"--teacher": "FOLDER/empty"}, "`teacher` must be a model"),
    "no folder": ({"--teacher": "./nowhere"}, "`teacher` must be a model's folder or hub name"),
    "bad model file": ({"--teacher": "FOLDER/garbled"}, "`teacher` can't be loaded from"),
    "pickled weights": ({"--teacher": "FOLDER/pickle"}, "no file named model.safetensors"),
    "no tokenizer": ({"--teacher": "FOLDER/mute"}, "`teacher` must have a tokenizer"),
    "weights that do not fit": (
        {"--teacher": "FOLDER/misfit"},
        "misfit has weights of other sizes than its config.json",
    ),
    "encoder and decoder": ({"--teacher": "FOLDER/bart"}, "`teacher` must be an encoder"),
    "several labels at once": (
        {"--teacher": "FOLDER/multi-label"},
        "`teacher` must be a model of single_label_classification, having 2 labels; its "
        "`problem_type` is multi_label_classification",
    ),
    "two numbers": (
        {"--teacher": "FOLDER/two-numbers"},
        "`teacher` must be a model of single_label_classification, having 2 labels; its "
        "`problem_type` is regression",
    ),
    "other student tokens": (
        {"--student_layers": None, "--student": "FOLDER/other-words"},
        "`student` must read the teacher's tokens, a vocabulary of 44, got 30",
    ),
    "student of other words": (
        {"--student_layers": None, "--student": "FOLDER/reversed"},
        "teacher does: 'w0' is 43 in ",
    ),
    "student with classes in another order": (
        {"--student_layers": None, "--student": "FOLDER/swapped"},
        "`student` must have the teacher's classes in their order, ['negative', 'positive'], got "
        "['positive', 'negative']",
    ),
    "no student": (
        {"--student_layers": None},
        "exactly one of `student_layers` and `student` must be given",
    ),
    "two students": ({"--student": "FOLDER/teacher"}, "exactly one of `student_layers`"),
    "too many layers": ({"--student_layers": "9"}, "`student_layers` must be in [1, 4]"),
    "no layers": ({"--student_layers": "0"}, "`student_layers` must be in [1, 4]"),
    "not a number": ({"--student_layers": "many"}, "--student_layers"),
    "unknown mapping": ({"--layer_mapping": "middle"}, "`layer_mapping` must be one of"),
    "mapping beyond": ({"--layer_mapping": "1:9"}, "`layer_mapping` must stay within 2 student"),
    "negative weight": ({"--kd_weight": "-1"}, "`kd_weight` must be 0 or more"),
    "weight nan": ({"--ce_weight": "nan"}, "`ce_weight` must be 0 or more"),
    "temperature 0": ({"--temperature": "0"}, "`temperature` must be positive"),
    "temperature nan": ({"--temperature": "nan"}, "`temperature` must be positive"),
    "unknown preset": (
        {"--preset": "mine"},
        "`preset` must be one of ('paper', 'official', 'nce_all', 'fidelity')",
    ),
    "unknown objective": ({"--objective": "margin"}, "`objective` must be one of"),
    "unknown positive": ({"--positive": "none"}, "`positive` must be one of"),
    "unknown negatives": ({"--negatives": "own"}, "`negatives` must be one of"),
    "fewer than no negatives": ({"--num_negatives": "-1"}, "`num_negatives` must be in [0"),
    "too many negatives": ({"--num_negatives": "1" + 12 * "0"}, "`num_negatives` must be in [0"),
    "no projection": ({"--projection_dim": "0"}, "`projection_dim` must be in [1, 65536]"),
    "too wide a projection": ({"--projection_dim": "1" + 11 * "0"}, "`projection_dim` must be in"),
    "unknown bank": ({"--bank_init": "full"}, "`bank_init` must be one of"),
    "momentum 2": ({"--bank_momentum": "2"}, "`bank_momentum` must be in [0, 1]"),
    "unknown head": ({"--head_init": "same"}, "`head_init` must be one of"),
    "negative pkd": ({"--pkd_weight": "-1"}, "`pkd_weight` must be 0 or more"),
    "no loss": ({"--ce_weight=0": "--kd_weight=0", "--codir_weight": "0"}, "no loss is left"),
    "unknown pooling": ({"--pooling": "sum"}, "`pooling` must be one of"),
    "label smoothing": ({"--label_smoothing_factor": "0.1"}, "`label_smoothing_factor` is not"),
    "another checkpoint": (
        {"--resume_from_checkpoint": "FOLDER/finetuned"},
        "so that it is of no distillation",
    ),
    "unknown label": ({"--train_file": "FOLDER/strange.csv"}, "row 1 has the label 'neutral'"),
    "truths": ({"--train_file": "FOLDER/truths.csv"}, "row 0 has the label 'True'"),
    "third class": (
        {"--train_file": "FOLDER/numbers.csv"},
        "`train_file` row 2 has the label '2', which the model does not know",
    ),
    "scores for a classifier": (
        {"--train_file": "FOLDER/scores.csv"},
        "`train_file` must hold integers or texts as labels, for the model is one of classes; row "
        "0 has 0.5",
    ),
    "classes for regression": (
        {"--teacher": "FOLDER/scorer"},
        "`train_file` must hold numbers as labels, for the model is one of regression; row 0 has",
    ),
    "classes to validate regression": (
        {"--teacher": "FOLDER/scorer", "--train_file": "FOLDER/scores.csv", **VALIDATION},
        "`validation_file` must hold numbers as labels",
    ),
    "temperature of regression": (
        {
            "--teacher": "FOLDER/scorer",
            "--train_file": "FOLDER/scores.csv",
            "--kd_temperature": "4",
        },
        "`kd_temperature` has no meaning where the teacher is one of regression",
    ),
    "bins of classes": (
        {"--label_bins": "3"},
        "`label_bins` has no meaning where the teacher is one of classes",
    ),
    "bins of classes, the default": (
        {"--label_bins": "5"},
        "`label_bins` has no meaning where the teacher is one of classes",
    ),
    "bins that nothing looks at": (
        {"--label_bins": "5", "--negatives": "all"},
        "`label_bins` needs `negatives` other_labels",
    ),
    "layers that nothing looks at": (
        {"--student_layers": None, "--student": "FOLDER/teacher", "--codir_weight": "0"}
        | {"--layer_mapping": "last"},
        "`layer_mapping` needs `student_layers`, `codir_weight` > 0 or `pkd_weight` > 0",
    ),
    "a cache that nothing looks at": (
        {"--kd_weight": "0", "--codir_weight": "0", "--cache_teacher": "True"},
        "`cache_teacher` needs `kd_weight` > 0, `codir_weight` > 0 or `pkd_weight` > 0",
    ),
    "more tokens than the default": (
        {"--max_seq_length": "128"},
        "`max_seq_length` must be at most 32, what the model can read, got 128",
    ),
    "one bin": ({"--label_bins": "1"}, "`label_bins` must be in [2"),
    "one score": (
        {"--teacher": "FOLDER/scorer", "--train_file": "FOLDER/one-score.csv"},
        "`negatives` other_labels needs training examples of at least 2 labels, all 2 have the",
    ),
    "infinite score": (
        {"--teacher": "FOLDER/scorer", "--train_file": "FOLDER/infinite.csv"},
        "`train_file` must hold finite labels, row 2 has inf",
    ),
    "a wide teacher's layers": (
        {"--student_layers": None, "--student": "FOLDER/narrow", "--pkd_weight": "1"},
        "`pkd_weight` > 0 needs a student as wide as the teacher, got hidden sizes 8 and 16",
    ),
    "a wide teacher's head": (
        {"--student_layers": None, "--student": "FOLDER/narrow", "--preset": "fidelity"},
        "`head_init` equal needs a student as wide as the teacher, got hidden sizes 8 and 16",
    ),
    "cache folder alone": ({"--teacher_cache_dir": "c"}, "`teacher_cache_dir` needs `cache_teach"),
}

EVALUATE = {
    "row of no class": (
        {"--test_file": "FOLDER/unlabelled.parquet"},
        "`test_file` row 1 has the label '-1', which the model does not know",
    ),
    "no model given": ({"--model_name_or_path": None}, "--model_name_or_path"),
    "no test file given": ({"--test_file": None}, "--test_file"),
    "no model": ({"--model_name_or_path": "FOLDER/empty"}, "`model_name_or_path` must be a model"),
    "bad model file": ({"--model_name_or_path": "FOLDER/garbled"}, "can't be loaded from"),
    "no tokenizer": ({"--model_name_or_path": "FOLDER/mute"}, "must have a tokenizer"),
    "no teacher": ({"--teacher": "FOLDER/empty"}, "`teacher` must be a model"),
    "a teacher of regression": (
        {"--teacher": "FOLDER/scorer"},
        "`teacher` must have the model's labels",
    ),
    "a teacher of other tokens": (
        {"--teacher": "FOLDER/other-words"},
        "`teacher` must have the model's vocabulary, 44, but",
    ),
    "a teacher of other words": (
        {"--teacher": "FOLDER/reversed"},
        "`teacher` must number tokens as ",
    ),
    "several labels at once": (
        {"--model_name_or_path": "FOLDER/multi-label"},
        "`model_name_or_path` must be a model of single_label_classification",
    ),
    "unknown label": ({"--test_file": "FOLDER/strange.csv"}, "row 1 has the label 'neutral'"),
    "scores for a classifier": (
        {"--test_file": "FOLDER/scores.csv"},
        "`test_file` must hold integers or texts as labels, for the model is one of classes",
    ),
    "classes for regression": (
        {"--model_name_or_path": "FOLDER/scorer"},
        "`test_file` must hold numbers as labels, for the model is one of regression",
    ),
    "device without values": ({"--device": "meta"}, "`device` 'meta' can't be used"),
    "unknown device": ({"--device": "abacus"}, "`device` 'abacus' can't be used"),
    "device that is not built": ({"--device": "vulkan"}, "`device` 'vulkan' can't be used"),
    "device that is not there": ({"--device": "cuda:99"}, "`device` 'cuda:99' can't be used"),
    "empty batch": ({"--batch_size": "0"}, "`batch_size` must be in [1, 2^31)"),
    "endless batch": ({"--batch_size": "1" + 20 * "0"}, "`batch_size` must be in [1, 2^31)"),
    "text for a batch": ({"--batch_size": "all"}, "--batch_size"),
    "too long": ({"--max_seq_length": "100"}, "`max_seq_length` must be at most 32"),
    "no room": ({"--max_seq_length": "2"}, "`max_seq_length` must be more than the 2 tokens"),
    "no room for two": (
        {"--test_file": "FOLDER/two-texts.csv", "--text_pair_column": "b", "--max_seq_length": "3"},
        "`max_seq_length` must be more than the 3 tokens",
    ),
    "no such column": ({"--text_column": "sentence"}, "`test_file` has no column 'sentence'"),
    "flag of training": ({"--learning_rate": "1"}, "evaluate has no flag --learning_rate"),
}

CASES = {
    f"{command}, {name}": (command, changes, message)
    for command, cases in (
        ("finetune", TRAINING | IGNORED | DATA | FINETUNE),
        ("distill", TRAINING | IGNORED | DATA | DISTILL),
        ("evaluate", EVALUATE),
    )
    for name, (changes, message) in cases.items()
} | {
    f"{command}, {file}": (command, {f"--{flag}": f"FOLDER/{file}"}, f"`{flag}` {message}")
    for command, flag in (
        ("finetune", "train_file"),
        ("distill", "train_file"),
        ("evaluate", "test_file"),
    )
    for file, message in FILES.items()
}


@pytest.fixture(scope="module")
def broken(folder, tmp_path_factory):
    """The tiny folder with models and files that no run should accept."""
    path = tmp_path_factory.mktemp("broken")
    shutil.copytree(folder, path, dirs_exist_ok=True)
    _write_models(path)
    _write_files(path)
    return path


def _write_models(path: Path) -> None:
    (path / "empty").mkdir()
    for name in ("garbled", "mute", "finetuned", "pickle", "misfit", "resized", "foreign"):
        shutil.copytree(path / "teacher", path / name)
    (path / "garbled" / "model.safetensors").write_bytes(b"no tensors at all")
    config = json.loads((path / "teacher" / "config.json").read_text())
    names = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (path / "misfit" / "config.json").write_text(json.dumps(config | names))
    (path / "resized" / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    save_file({"other": torch.ones(2)}, path / "foreign" / "model.safetensors", {"format": "pt"})
    for file in (path / "mute").glob("tokenizer*"):
        file.unlink()
    (path / "finetuned" / "trainer_state.json").write_text("{}")
    write_manifest(path / "finetuned", order=0)
    (path / "pickle" / "model.safetensors").unlink()
    torch.save({}, path / "pickle" / "pytorch_model.bin")
    one = {"id2label": {0: "score"}, "label2id": {"score": 0}}
    for name, changes in {
        "scorer": one,
        "multi-label": {"problem_type": "multi_label_classification"},
        "two-numbers": {"problem_type": "regression"},
        "other-words": {"vocab_size": 30},
        "narrow": {"hidden_size": 8, "num_hidden_layers": 2},
    }.items():
        shutil.copytree(path / "mute", path / name)
        shutil.copy(path / "teacher" / "tokenizer.json", path / name)
        shutil.copy(path / "teacher" / "tokenizer_config.json", path / name)
        BertForSequenceClassification(tiny_config(**changes)).save_pretrained(path / name)
    shutil.copytree(path / "teacher", path / "padless")
    padless = json.loads((path / "padless" / "tokenizer_config.json").read_text())
    del padless["pad_token"]
    (path / "padless" / "tokenizer_config.json").write_text(json.dumps(padless))
    shutil.copytree(path / "teacher", path / "broken")
    weights = load_file(path / "broken" / "model.safetensors")
    weights["classifier.bias"].fill_(torch.nan)
    save_file(weights, path / "broken" / "model.safetensors", {"format": "pt"})
    shutil.copytree(path / "teacher", path / "reversed")
    make_tokenizer(WORDS[::-1]).save_pretrained(path / "reversed")
    shutil.copytree(path / "teacher", path / "swapped")
    swapped = {name: 1 - number for name, number in config["label2id"].items()}
    names = {"id2label": {n: name for name, n in swapped.items()}, "label2id": swapped}
    (path / "swapped" / "config.json").write_text(json.dumps(config | names))
    shutil.copytree(path / "teacher", path / "bart")
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 44}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 2, "decoder_layers": 2}
    bart = BartConfig(**sizes, **heads, **layers, pad_token_id=0, eos_token_id=3, num_labels=3)
    BartForSequenceClassification(bart).save_pretrained(path / "bart")


def _write_files(path: Path) -> None:
    (path / "folder.csv").mkdir()
    (path / "dangling.csv").symlink_to(path / "nowhere.csv")
    (path / "unreadable.csv").symlink_to("/proc/self/mem")
    (path / "teacher" / "config.xml").write_text("<a/>")
    for name, data in {
        "binary.csv": bytes(range(256)) * 10,
        **dict.fromkeys(("nothing.csv", "nothing.json", "nothing.jsonl"), b""),
        "no-row.json": b"[]",
        "latin-1.csv": "text,label\nw1 ü,positive\nw2,negative\n".encode("latin-1"),
        "utf-16.csv": "text,label\nw1,positive\nw2,negative\n".encode("utf-16"),
        "garbled.parquet": b"PAR1, no more",
    }.items():
        (path / name).write_bytes(data)
    for name, rows in {
        "none": "",
        "ragged": "w1,positive\nw2,negative,more\n",
        "open-quote": '"w1,positive\nw2,negative\n',
        "strange": "w1,positive\nw2,neutral\n",
        "hole": ",positive\nw2,negative\n",
        "no-label": "w1,positive\nw2,\n",
        "scores": "w1,0.5\nw2,1.5\nw3,0.25\n",
        "infinite": "w1,0.5\nw2,1.5\nw3,inf\n",
        "huge": "w1,0.5\nw2,1e39\n",
        "missing-score": "w1,0.5\nw2,\n",
        "one-score": "w1,0.5\nw2,0.5\n",
        "one-class": "w1,positive\nw2,positive\n",
        "truths": "w1,True\nw2,False\n",
        "numbers": "w1,0\nw2,1\nw3,2\n",
        "ranks": "w1,1\nw2,2\nw3,3\n",
        "rank-0": "w1,0\nw2,1\n",
    }.items():
        (path / f"{name}.csv").write_text(f"text,label\n{rows}")
    (path / "no-header.csv").write_text("w1,positive\nw2,negative\n")
    (path / "semicolons.csv").write_text("text;label\nw1;positive\nw2;negative\n")
    (path / "twice.csv").write_text("text,label,text\nw1,positive,w2\nw2,negative,w3\n")
    (path / "pairs.csv").write_text("text,number,label\nw1,1,positive\nw2,2,negative\n")
    (path / "two-texts.csv").write_text("text,b,label\nw1,w2,positive\nw2,w3,negative\n")
    (path / "cut.jsonl").write_text('{"text": "w1", "label": "positive"}\n{"text": ')
    (path / "number.json").write_text("5")
    rows = [{"text": "w1", "label": ["positive"]}, {"text": "w2", "label": ["negative"]}]
    (path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"text": "w1", "label": "positive"}, {"text": "w2", "label": 1}]
    (path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_dict({"text": ["w1", "w2"], "label": [0.5, float("nan")]}).to_parquet(
        path / "nan.parquet"
    )
    for name, names, labels in (
        ("unlabelled", ["negative", "positive"], [0, -1]),
        ("one-name", ["positive"], [0, 0]),
    ):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        rows = {"text": ["w1", "w2"], "label": labels}
        Dataset.from_dict(rows, features).to_parquet(path / f"{name}.parquet")


@pytest.mark.parametrize("name", CASES)
def test_error_is_one_line_with_exit_code_2(name, broken, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    command, changes, message = CASES[name]
    given = BASE[command] | changes
    arguments = [part for pair in given.items() if pair[1] is not None for part in pair]
    arguments = [part.replace("FOLDER", str(broken)) for part in arguments]
    if command != "evaluate":
        arguments.append("--use_cpu")
    before = sorted(broken.rglob("*"))
    assert main([command, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("codir-fast: error: ") and error.count("\n") == 1
    assert message in error
    assert len(error) < 1000
    assert list(tmp_path.iterdir()) == [] and sorted(broken.rglob("*")) == before


def test_there_are_enough_cases_of_each_command():
    assert len(CASES) > 250
    for command in BASE:
        assert sum(case[0] == command for case in CASES.values()) > 40


@pytest.mark.parametrize(
    ("optimizer", "is_there"),
    [("adamw_8bit", is_bitsandbytes_available), ("galore_adamw", is_galore_torch_available)],
)
def test_optimizer_of_a_missing_package(optimizer, is_there, folder, tmp_path, capsys):
    if is_there():
        pytest.skip(f"the package of {optimizer} is installed")
    arguments = ["--model_name_or_path", str(folder / "teacher"), "--optim", optimizer, "--use_cpu"]
    files = ["--train_file", str(folder / "train.csv"), "--output_dir", str(tmp_path / "out")]
    assert main(["finetune", *arguments, *files]) == 2
    assert f"`optim` {optimizer} can't be used: You need to install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_error_of_a_process_is_one_line(folder, tmp_path):
    """Whatever libraries print by themselves on the way."""
    arguments = ["finetune", "--model_name_or_path", str(folder / "teacher")]
    arguments += ["--train_file", str(folder / "train.csv"), "--output_dir", "out", "--use_cpu"]
    arguments += ["--max_seq_length", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "codir_fast", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("codir-fast: error: ")
    assert list(tmp_path.iterdir()) == []


def test_byte_order_mark_and_unicode_are_read(folder, tmp_path):
    rows = "text,label\nw1 ü 中,positive\nw2,negative\n" * 1
    (tmp_path / "bom.csv").write_bytes(("\ufeff" + rows).encode())
    arguments = ["--model_name_or_path", str(folder / "teacher"), "--use_cpu"]
    files = ["--train_file", str(tmp_path / "bom.csv"), "--output_dir", str(tmp_path / "out")]
    assert main(["finetune", *arguments, *files, "--max_steps", "1"]) == 0


def test_flags_that_have_an_effect_are_taken(folder, tmp_path):
    """Each of them is refused where what it needs is not there."""
    arguments = ["--model_name_or_path", str(folder / "teacher"), "--use_cpu"]
    files = ["--train_file", str(folder / "train.csv"), "--output_dir", str(tmp_path / "out")]
    files += ["--validation_file", str(folder / "validation.csv")]
    flags = {
        **{"do_train": "True", "do_eval": "True", "max_steps": "4"},
        **{"eval_strategy": "steps", "eval_steps": "2", "eval_delay": "3"},
        **{"eval_accumulation_steps": "1", "eval_do_concat_batches": "False"},
        **{"batch_eval_metrics": "True", "prediction_loss_only": "False"},
        **{"save_strategy": "steps", "save_steps": "2", "save_total_limit": "1"},
        **{"save_only_model": "True", "logging_strategy": "steps", "logging_steps": "1"},
        **{"warmup_steps": "2", "adam_beta1": "0.8", "adam_epsilon": "1e-7", "data_seed": "5"},
        **{"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": 1}'},
        **{"per_device_eval_batch_size": "5", "metric_for_best_model": "accuracy"},
        **{"greater_is_better": "True"},
    }
    given = [part for name, value in flags.items() for part in (f"--{name}", value)]
    assert main(["finetune", *arguments, *files, *given, "--average_tokens_across_devices"]) == 0
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "eval_accuracy" in row] == [4, 4]


def test_outputs_that_are_no_numbers_are_told(broken, capsys):
    for flag, name in (("model_name_or_path", "loss"), ("teacher", "kl")):
        given = {"model_name_or_path": "teacher", "teacher": "teacher", flag: "broken"}
        models = [part for key, folder in given.items() for part in (f"--{key}", broken / folder)]
        arguments = ["evaluate", *models, "--test_file", broken / "validation.csv"]
        assert main([*map(str, arguments), "--device", "cpu"]) == 2
        shown = capsys.readouterr()
        assert f"error: `{flag}` must give finite outputs, {name} is nan\n" in shown.err
        assert not shown.out
