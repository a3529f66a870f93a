"""Vision backbones: pixels in, (views, N, Dv) features out."""
