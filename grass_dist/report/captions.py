"""Holds for each picture its heading, what it shows, and what the page says where there is none."""

CAPTIONS = {
    "loss": (
        "Loss",
        "The faint line is the loss of each step, the strong one its running mean, and the diamonds are the loss on "
        "examples held out of the training. The diamonds should fall; if they rise while the line falls, the model "
        "has begun to memorise.",
        "No loss was recorded, so there is no picture of it.",
    ),
    "importance": (
        "Importance",
        "Each row is a layer, with the input at the bottom; its colour is the root-mean-square gradient of the layer "
        "over the mean of all layers, held until the next refresh. A layer at 2 has gradients twice the average, and "
        "rows that change colour along the run are why the probabilities are refreshed.",
        "No importances were recorded: this sampler does not measure them, or the run ended before the first refresh.",
    ),
    "probability": (
        "Sampling",
        "The colour is the probability with which a draw picks the layer, and the white marks are the layers that "
        "were drawn and trained. Bright rows should carry more marks than dark ones; the bars below count every "
        "step.",
        "No sampling probabilities were recorded, so there is no picture of them.",
    ),
    "counts": (
        "Coverage",
        "Each bar counts the steps that trained the layer; the probe trains none and is not counted. The dashed line "
        "is where every bar would end if all layers were drawn equally often.",
        "No training step was recorded, so no layer was trained.",
    ),
    "cost": (
        "Cost",
        "From top to bottom: how long each step took, how many bytes of gradients this rank put into reduce-scatter "
        "or all-reduce, and how much optimizer state it held, on its device and at rest in host memory. A probe "
        "measures every layer, so its reduced bytes are those of training every layer; the drop after it is what "
        "training a few layers saves.",
        "No step was recorded, so there is no picture of its cost.",
    ),
    "moves": (
        "States on the move",
        "Bars upwards are optimizer states that came to the device in a step, bars downwards those that went back to "
        "host memory: at the switches in the mode interval, at every step in the mode stream. Below is how long the "
        "copies ran, and how long training stood still for one; where that is next to nothing, the moves are free.",
        "No optimizer state moved between device and host memory, or the record does not say so.",
    ),
}
