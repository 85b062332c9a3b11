"""How much data is enough: runs on nested subsets of growing size, and a saturating curve through their scores."""
