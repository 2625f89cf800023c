"""What a stage does: plain Python, no prefect, each part usable and testable by hand.

Words used everywhere (the whole list is in `docs/design.md`):

- recipe: one YAML file in `configs/`, everything that decides *what* comes out
- runtime: where and how it runs; changes nothing but the order of floating-point sums
- stage: one step of the DAG, a pure function from artifacts and a slice of the recipe to one artifact
- job: one stage to run, with its inputs and its resolved config slice
- artifact: an immutable folder in the store; ref: the small value that names it
- fingerprint: sha256 of a job's payload; digest: sha256 of an artifact's result files
"""

__version__ = "0.1.0"
