"""What uses the model to measure something: never imported by it.

`python -m experiments.NAME -h` explains bench, channels, cosine, labels, learnable, losses, page,
prepare, reader, reproduce and tour. All else is a part of these.

To test a claim
    reproduce      arms, seeds, bases; runs them and measures each
    channels       what a map says and how it is taught; restoration: spoilt pictures to be mended
    drawing        what a model finds likely; probes: what its states hold and where its attention looks
    report         statistics, verdicts, tables; figures: gains, curves, pictures
    labels         the figure "Labels or generation?", and what is known without shapes
    cosine         do maps and questions pull the model the same way?

To look at a model
    page           draw and look in a browser; tour, tour_cells: the notebook
    losses         of a run, beside a uniform guess; bench: speed against peers

Data sets of your own
    prepare        the command line; writer: what the converters share
    digits, codraw, coco, pets, windows        each converts one kind
    check          what a folder holds; learnable: which of its questions can be learned
    reader         how well drawings of real pictures show their captions
"""
import data  # noqa: F401  before torch: it tells OpenMP how to wait
