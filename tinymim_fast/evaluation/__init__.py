"""What a model learnt, measured: features of images, and the accuracy of classifiers on them."""
