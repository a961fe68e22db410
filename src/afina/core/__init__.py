"""The mechanism: adapters as advice around layers, and everything that finds, holds, stores and combines them."""
