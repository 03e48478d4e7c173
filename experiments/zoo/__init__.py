"""The recipes that made the models in fieldsmith/zoo: settings -> a diffusers pipeline, card.json and README.md."""
