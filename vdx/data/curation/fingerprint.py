"""A perceptual hash over time: near-duplicates of a clip have nearly the same one.

Every sample of time has a hash of the image: signs of its coarse cosine transform, as in pHash
(Zauner 2010). Enlarging, recompressing and small changes of brightness leave most signs.
"""
