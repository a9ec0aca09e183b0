//! What the end-to-end tests and benches share: the door to a bed's engine. Refuses to know what is tested with it.

pub mod apart;
pub mod beside;
pub mod compat;
pub mod engine;
pub mod host;
pub mod matrix;
pub mod measure;
pub mod mutate;
pub mod runtime;
pub mod terminal;
