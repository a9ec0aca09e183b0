//! What a read costs: `readcost ROUNDS FILE...` opens, reads once and closes each file in turn, interleaved, and
//! prints the median of the rounds in microseconds for each, and its ratio to the first.

use std::fs::File;
use std::io::Read;
use std::time::Instant;

const READS_A_ROUND: u32 = 300;

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let rounds = arguments.first().and_then(|text| text.parse().ok()).unwrap_or(15);
    let files = arguments.get(1..).unwrap_or_default();
    let mut costs = vec![Vec::new(); files.len()];
    let mut buffer = [0; 16384];
    for _ in 0..rounds {
        for (file, costs) in files.iter().zip(&mut costs) {
            let begun = Instant::now();
            for _ in 0..READS_A_ROUND {
                File::open(file)?.read(&mut buffer).map(drop)?;
            }
            costs.push(begun.elapsed().as_secs_f64() * 1e6 / f64::from(READS_A_ROUND));
        }
    }
    let medians: Vec<f64> = costs
        .iter_mut()
        .map(|costs| {
            costs.sort_by(f64::total_cmp);
            costs.get(costs.len() / 2).copied().unwrap_or_default()
        })
        .collect();
    for (file, median) in files.iter().zip(&medians) {
        println!("{median:8.1} us  {:6.2}  {file}", median / medians[0]);
    }
    Ok(())
}
