"""Parts of the receptive-field recipe: networks, images, and what is made of the scores."""
