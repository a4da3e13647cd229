"""The measurement of a session: captures, scores, floors, matrices, speed."""
