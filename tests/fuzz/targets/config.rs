//! Any bytes as config.json: refused in words that name the place, or planned inside the rootfs, and nothing else.
//! With SEEDS=DIR in the environment it writes what a search begins with.

#![no_main]

mod seeds;

fn prepare() {
    if let Some(dir) = std::env::var_os("SEEDS") {
        let written = seeds::write(dir.as_ref());
        std::process::exit(i32::from(written.inspect_err(|error| eprintln!("seeds: {error}")).is_err()));
    }
}

libfuzzer_sys::fuzz_target!(init: prepare(), |text: &[u8]| {
    match sysbox_runc::judged(text) {
        Ok(inside) => assert!(inside, "leads out of the rootfs"),
        Err(error) => {
            let line = error.replace('\n', "; ");
            assert!(sysbox_runc::names_a_place(&line), "names no place: {line}");
        }
    }
});
