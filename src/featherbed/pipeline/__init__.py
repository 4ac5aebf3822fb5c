"""The rivers: each verb of the library on one screen."""
