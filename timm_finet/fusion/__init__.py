"""How fusing and converting find their pairs: a run is watched, and what was changed is proven on another run."""
